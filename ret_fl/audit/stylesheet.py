"""How report.html looks: light and dark, narrow and wide, on paper."""

STYLE = """\
:root {
  --paper: #ffffff; --plate: #f4f6f8; --line: #d5dae0; --ink: #1f2933; --muted: #5b6672; --grid: #d5dae0;
  --red: #b42318; --blue: #1d5fbf; --green: #0b7a5c; --amber: #9a5b00; --plum: #7a3fa0;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --plate: #1d232a; --line: #38424d; --ink: #e6eaee; --muted: #a3afbb; --grid: #38424d;
    --red: #ff8a7a; --blue: #7fb2ff; --green: #4fd1a5; --amber: #f0b35a; --plum: #cf9df0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
main { padding-top: 2rem; }
footer { padding-top: 2rem; padding-bottom: 2.5rem; color: var(--muted); font-size: .875rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.375rem; line-height: 1.3; margin: 3rem 0 .75rem; }
h3 { font-size: 1.0625rem; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.note, figcaption + .note { color: var(--muted); font-size: .9rem; }
a { color: var(--blue); }
.caution { border-left: .25rem solid var(--amber); padding-left: .75rem; }

.verdict {
  border-left: .375rem solid var(--tone);
  background: var(--plate);
  border-radius: .25rem;
  padding: 1rem 1.25rem;
}
.verdict b { display: block; color: var(--tone); font-size: .9375rem; margin-bottom: .25rem; }
.verdict p { font-size: 1.25rem; line-height: 1.5; margin: 0; max-width: none; }
.copies { --tone: var(--red); } .maybe, .tells { --tone: var(--amber); }
.none { --tone: var(--green); } .unknown, .unlearned { --tone: var(--muted); }

.cards {
  display: grid;
  gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(13.5rem, 100%), 1fr));
  margin: 1rem 0;
}
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.card h3 { font-size: .9375rem; font-weight: 600; margin: 0; color: var(--muted); }
.card .value { font-size: 1.75rem; line-height: 1.25; font-weight: 650; }
.card p { margin: 0; font-size: .875rem; }
.card .value, .whole { white-space: nowrap; }
.card p + p { color: var(--muted); }

table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th, thead th:first-child { font-size: .8125rem; font-weight: 600; color: var(--muted); vertical-align: bottom; }
tbody.group th[colspan] { font-weight: 650; padding-top: 1.1rem; }
.scroll { overflow-x: auto; }
.scroll th, .scroll td { padding-left: .5rem; padding-right: .5rem; }
td { white-space: nowrap; }
.scroll tbody th { min-width: 7rem; overflow-wrap: anywhere; }

.charts { display: grid; gap: 1.25rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.charts > .chart { max-width: 30rem; }
figure { margin: 0; }
.chart { margin: .75rem 0; }
.chart.alone { max-width: 30rem; }
.chart svg { display: block; width: 100%; height: auto; }
figcaption { font-weight: 600; margin-bottom: .25rem; }

img { image-rendering: pixelated; display: block; }
.sheet { width: 100%; max-width: 38rem; height: auto; }
.tiles {
  display: grid;
  gap: 1.25rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  margin: 1rem 0;
}
.tiles.small { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; font-size: .75rem; color: var(--muted); }
.pair img, .small img { width: 100%; height: auto; border-radius: 2px; }
.tiles p { margin: .3rem 0 0; font-size: .8125rem; line-height: 1.4; }
.tiles .is-copy { color: var(--red); font-weight: 650; }

.facts {
  margin: .5rem 0;
  display: grid;
  gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
}
.facts div {
  display: flex;
  justify-content: space-between;
  gap: 1rem;
  border-bottom: 1px solid var(--line);
  padding: .3rem 0;
  font-size: .9375rem;
}
.facts dt { color: var(--muted); flex: none; max-width: 60%; overflow-wrap: anywhere; }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
.methods { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.methods p { font-size: .9375rem; }
.warnings li { margin: .35rem 0; overflow-wrap: anywhere; max-width: 44rem; }

@media screen and (max-width: 40rem) {
  body { font-size: 1rem; }
  main { padding-top: 1.25rem; }
  main, footer { padding-left: 1rem; padding-right: 1rem; }
  .verdict { padding: .875rem 1rem; }
  .verdict p { font-size: 1.125rem; }
  .cards { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles.small { grid-template-columns: repeat(3, 1fr); }
}
@media screen and (max-width: 56rem) {
  .stack thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stack, .stack tbody, .stack tr, .stack th, .stack td {
    display: block;
    width: auto;
    text-align: left;
    padding: 0;
    border: 0;
  }
  .stack tr { border-bottom: 1px solid var(--line); padding: .55rem 0; }
  .stack tbody th { font-weight: 600; }
  .stack td { display: flex; justify-content: space-between; gap: 1rem; white-space: normal; text-align: right; }
  .stack td::before { content: attr(data-label); color: var(--muted); text-align: left; }
  .stack td.empty { display: none; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10.5pt; }
  main, footer { max-width: none; padding: 0; }
  footer { padding-top: 4mm; break-before: avoid; }
  h2, h3, figcaption, section > p:has(+ div, + img), thead { break-after: avoid; }
  figure, .card, .tiles > div, .verdict, tr, .facts, .methods > div, li, .caution { break-inside: avoid; }
  p { orphans: 3; widows: 3; }
  .verdict p { font-size: 12.5pt; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(33mm, 1fr)); gap: 2mm; }
  .card { padding: 2mm 2.5mm; }
  .card .value { font-size: 12.5pt; }
  .whole { white-space: normal; }
  .card p, .card h3 { font-size: 8.5pt; }
  .stack { font-size: 8.5pt; }
  .stack th, .stack td { padding: .25rem .35rem; }
  .charts { grid-template-columns: 1fr 1fr; }
  .charts > .chart, .chart.alone { max-width: 9cm; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .tiles.small { grid-template-columns: repeat(8, 1fr); }
  .sheet { max-width: 11cm; }
  .facts, .methods { grid-template-columns: 1fr 1fr; }
  .facts div, .methods p { font-size: 9pt; }
  .scroll { overflow: visible; }
  .scroll tbody th { min-width: 3.5rem; }
  .scroll .wide { font-size: 7.5pt; }
  .scroll .wide td { white-space: normal; min-width: 12mm; }
  .verdict, img { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
