"""The report's style sheet, light and dark; text, so that a report is one file without
others.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #55606e; --line: #dfe3e8; --grid:
    #e9ecf0; --accent: #c8440a; --hit: #e3f4ea; --hit-ink: #0b6b43;
  --c0: #1763c6; --c1: #c8440a; --c2: #0a7d55; --c3: #7a3fd1; --c4: #96690a; --c5: #bf2a7c;
    --c6: #0a7f9c; --c7: #59636f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2129; --ink: #e8ecf1; --soft: #a3adb9; --line: #2f3843; --grid:
      #2a323c; --accent: #ff9a63; --hit: #143a2a; --hit-ink: #7fe0b0;
    --c0: #6fb0ff; --c1: #ff9a63; --c2: #4fd09c; --c3: #bd9bff; --c4: #e5b84b; --c5: #ff86c2;
      --c6: #5fd0ea; --c7: #a9b4c0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); }
nav { margin: 18px 0 0; display: flex; flex-wrap: wrap; gap: 6px 18px; }
a { color: var(--c0); text-underline-offset: 3px; }
:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px; border-radius: 3px; }
h2 { margin: 44px 0 14px; font-size: 20px; }
h3 { margin: 26px 0 10px; font-size: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding:
  18px 20px; }
.warning { margin: 12px 0 0; padding: 8px 12px; border-left: 4px solid var(--accent);
  background: var(--card); }
.note { margin: 6px 0 0; color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin: 22px 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 18px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 2px 0 0; font-size: 25px; font-weight: 650; font-variant-numeric:
  tabular-nums; }
.tiles dd small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding-bottom: 8px; }
th, td { padding: 7px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space:
  nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
thead th { font-size: 13px; color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; vertical-align: top; }
tbody td { vertical-align: top; }
tr.group th { color: var(--soft); font-weight: 600; font-size: 13px; padding-top: 16px; }
tr.highlighted th { color: var(--accent); }
td small { display: block; font-size: 12px; font-weight: 400; color: var(--soft); line-height:
  1.2; }
td.best { font-weight: 700; }
table.facts td:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { text-align: left; font-weight: 500; color: var(--soft); width: 1%; }
table.stages td.meter { width: 60%; }
td.meter { vertical-align: middle; }
.meter span { display: block; height: 10px; min-width: 2px; border-radius: 5px; background:
  var(--c0); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr));
  gap: 14px; }
.pair + .grid { margin-top: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 16px; align-items: start; }
figure.chart { margin: 0; max-width: 460px; background: var(--card); border: 1px solid
  var(--line); border-radius: 12px; padding: 13px 12px 12px; }
figcaption { font-weight: 620; font-size: 14px; margin: 0 0 8px 4px; }
figure .note { margin-left: 4px; font-size: 12.5px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path.grid { stroke: var(--grid); fill: none; }
svg path.axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap:
  round; }
.dot { fill: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.d1 { stroke-dasharray: 6 4; } .d2 { stroke-dasharray: 1.5 4; } .d3 { stroke-dasharray: 9 4 1.5
  4; }
.band rect { fill: transparent; }
.band path { stroke: var(--soft); stroke-dasharray: 3 3; opacity: 0; }
.band:hover path { opacity: .9; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0 4px;
  padding: 0; font-size: 12.5px; color: var(--soft); }
.legend svg { display: inline-block; width: 26px; margin-right: 6px; vertical-align: middle; }
.bars { max-width: 760px; min-width: 460px; margin-top: 6px; }
.bars text.name { font-size: 13px; fill: var(--ink); } .bars text.value { font-size: 12.5px;
  fill: var(--ink); }
.bar { fill: var(--c0); opacity: .75; } .bar.highlighted { fill: var(--c1); opacity: 1; }
  .bar.bound { fill: var(--c7); opacity: .5; }
.whisker { stroke: var(--ink); stroke-width: 1.6; }
.example { margin-bottom: 16px; }
.example h3 { margin: 0 0 8px; overflow-wrap: anywhere; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 0; padding: 0;
  font-size: 13px; }
.chips li { border: 1px solid var(--line); border-radius: 7px; padding: 2px 9px; max-width:
  340px; overflow-wrap: anywhere; }
.chips li.target { border-color: var(--hit-ink); background: var(--hit); color: var(--hit-ink);
  font-weight: 600; }
.label { color: var(--soft); font-size: 12.5px; margin: 12px 0 5px; }
.beams { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 4px 28px; margin-top: 6px; }
.beams h4 { margin: 12px 0 4px; font-size: 14px; }
.beams h4 .note { font-weight: 400; margin-left: 6px; }
#examples + .note { margin: -8px 0 12px; }
.beams td { white-space: normal; font-size: 13.5px; padding: 4px 8px; vertical-align: top; }
.beams td:nth-child(2) { text-align: left; overflow-wrap: anywhere; width: 100%; }
.beams td:first-child { color: var(--soft); }
.beams tr.hit td { background: var(--hit); color: var(--hit-ink); font-weight: 600; }
.mark { font-size: 12px; border: 1px solid currentColor; border-radius: 5px; padding: 0 5px;
  margin-left: 6px; white-space: nowrap; }
details summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu
  Sans Mono", monospace; margin: 12px 0 0; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
@media print { .card, figure.chart, .tiles div { break-inside: avoid; } nav { display: none; } }
"""
