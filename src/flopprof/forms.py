"""Closed forms of counts: polynomials and floor forms in named sizes, with exact coefficients. No torch."""
