// The last script: what needs no script of its own is drawn.
showTheme();
for (const [id, { data: traces, layout }] of Object.entries(data.figures)) draw(id, traces, layout);
