"""The look of the page."""

STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#fff, #16181b);
  --shadow: light-dark(#0005, #fff5); }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: light-dark(#1c1c1c, #e4e4e4); background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
/* a shadow at an edge shows that the table goes on there */
.wide { overflow-x: auto; margin-bottom: 1rem; background:
  linear-gradient(to right, var(--paper) 1rem, transparent) 0 0 / 1.5rem 100% local no-repeat,
  linear-gradient(to left, var(--paper) 1rem, transparent) 100% 0 / 1.5rem 100% local no-repeat,
  linear-gradient(to right, var(--shadow), transparent) 0 0 / 1rem 100% scroll no-repeat,
  linear-gradient(to left, var(--shadow), transparent) 100% 0 / 1rem 100% scroll no-repeat; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid light-dark(#ddd, #383c42); }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
@media (max-width: 40rem) { th, td { padding-left: .3rem; padding-right: .3rem; } }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; }
figcaption, .note, details { font-size: .875rem; color: light-dark(#555, #a4a8ae); }
pre { overflow-x: auto; }
"""
