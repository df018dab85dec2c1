"""Results as one HTML file each, which needs no network: profiles, ledgers, comparisons and runs."""
