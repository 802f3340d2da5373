"""The page's style sheet: light, dark and on paper, no font or picture from elsewhere."""

STYLE = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#55606e;--line:#d9dee5;--paper:#ffffff;
--card:#f6f8fa;--accent:#0b5cad;--tissue:#0b6fb8;--glass:#9fb0c3;--good:#0a6b3d;--good-bg:#e3f4ea;
--bad:#a3003f;--bad-bg:#fde7f0;--note:#6b4e00;--note-bg:#fdf3d7;--floor:#c2004f}
@media (prefers-color-scheme:dark){:root{--ink:#e7ebf0;--soft:#a5b0bd;--line:#343d49;
--paper:#12171e;--card:#1a212a;--accent:#7db8f5;--tissue:#56a8ea;--glass:#5d6c7e;--good:#7fd8a8;
--good-bg:#12301f;--bad:#ff9cc0;--bad-bg:#3d1226;--note:#f1d58a;--note-bg:#332a10;
--floor:#ff6fa5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:36px}
.kicker{margin:0;color:var(--soft);font-size:13px;letter-spacing:.08em;text-transform:uppercase}
h1{margin:2px 0 4px;font-size:30px;line-height:1.2;overflow-wrap:anywhere}
h2{margin:44px 0 6px;font-size:20px;border-bottom:1px solid var(--line);padding-bottom:6px}
h3{margin:0;font-size:15px}
p{margin:6px 0;max-width:78ch}
.lead{color:var(--soft)}
.verdict{margin:18px 0 0;padding:12px 16px;border-radius:8px;border-left:5px solid;max-width:none}
.verdict b{display:block;font-size:17px}
.good{background:var(--good-bg);border-color:var(--good)}.good b{color:var(--good)}
.bad{background:var(--bad-bg);border-color:var(--bad)}.bad b{color:var(--bad)}
.note{background:var(--note-bg);border-color:var(--note)}.note b{color:var(--note)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;
margin:18px 0 0;padding:0;list-style:none}
.cards li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.cards span{display:block;color:var(--soft);font-size:13px}
.cards b{display:block;font-size:23px;line-height:1.25;font-variant-numeric:tabular-nums}
.cards small{color:var(--soft);font-size:12.5px}
figure{margin:0}
figcaption{margin-top:6px;font-size:13px;color:var(--soft)}
figcaption b{color:var(--ink);font-size:15px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:26px 22px;
margin-top:14px}
.slide{position:relative;overflow:hidden;border:1px solid var(--line);border-radius:4px;
background:#fff}
.slide img{position:absolute;left:0;top:0;display:block}
.slide img.grid-map{image-rendering:pixelated}
.slide svg{position:absolute;inset:0;width:100%;height:100%}
.contour{fill:none;stroke:#101418;stroke-width:1.4;vector-effect:non-scaling-stroke}
.halo{fill:none;stroke:#fff;stroke-width:3.2;stroke-opacity:.75;vector-effect:non-scaling-stroke}
.spot{fill:none;stroke:#d6006c;stroke-width:2;vector-effect:non-scaling-stroke}
.spotted{font:700 13px system-ui,sans-serif;fill:#fff;text-anchor:middle}
.spotdisc{fill:#b0005a;stroke:#fff;stroke-width:1}
.ramp{display:flex;align-items:center;gap:8px;margin-top:8px;font-size:12.5px;
font-variant-numeric:tabular-nums;color:var(--soft)}
.ramp i{flex:1;height:11px;border-radius:3px;border:1px solid var(--line);
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.keys{display:flex;flex-wrap:wrap;gap:3px 14px;margin:8px 0 0;padding:0;list-style:none;
font-size:12.5px;color:var(--soft)}
.keys i{display:inline-block;width:12px;height:12px;margin-right:5px;border-radius:2px;
border:1px solid #8888;vertical-align:-2px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));gap:18px;
margin-top:10px}
.chart{width:100%;height:auto;display:block}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.chart .axis{fill:var(--ink);font-size:12.5px}
.chart .grid{stroke:var(--line)}
.bar.tissue,.bar.all{fill:var(--tissue)}.bar.glass{fill:var(--glass)}
.mark{stroke-width:1.6}.mark.floor{stroke:var(--floor);stroke-dasharray:5 3}
.mark.mean{stroke:var(--ink);stroke-dasharray:2 2}
.chart .marklabel.floor{fill:var(--floor);font-weight:600}.chart .marklabel.mean{fill:var(--ink)}
.key-tissue{background:var(--tissue)}.key-glass{background:var(--glass)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin-top:10px;font-size:14px;
font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;font-size:12.5px;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
th.group{text-align:center;border-bottom:0}
td.bad-cell{color:var(--bad);font-weight:700}
.worst{display:grid;gap:16px;margin-top:14px}
.worst.alone{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}
.tile{border:1px solid var(--line);border-radius:8px;padding:14px;background:var(--card);
display:grid;grid-template-columns:190px 1fr;gap:16px;break-inside:avoid}
.tile dl{display:grid;grid-template-columns:auto 1fr;gap:1px 10px;margin:8px 0 0;font-size:13.5px;
font-variant-numeric:tabular-nums}
.tile dt{color:var(--soft)}.tile dd{margin:0;text-align:right}
.rank{display:inline-block;min-width:26px;padding:0 7px;margin-right:6px;border-radius:13px;
background:#b0005a;color:#fff;text-align:center;font-weight:700;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.trio{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
align-items:start;max-width:900px}
.trio img{display:block;width:100%;max-width:288px;height:auto;border-radius:3px;
border:1px solid var(--line)}
.facts{display:grid;grid-template-columns:minmax(150px,max-content) 1fr;gap:5px 22px;
margin:12px 0 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details{margin-top:18px}summary{cursor:pointer;color:var(--accent)}
.tag{display:inline-block;padding:0 8px;border-radius:10px;font-size:12px;font-weight:600;
border:1px solid var(--line)}
.tag.bad-tag{color:var(--bad);border-color:var(--bad)}
footer{margin-top:48px;padding-top:14px;padding-bottom:36px;color:var(--soft);font-size:13px;
border-top:1px solid var(--line)}
@media (max-width:720px){.tile{grid-template-columns:1fr}.facts{grid-template-columns:1fr}
.facts dd{margin-bottom:6px}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;
--card:#fff;--accent:#000;--tissue:#0b6fb8;--glass:#9fb0c3;--good:#0a6b3d;--good-bg:#fff;
--bad:#a3003f;--bad-bg:#fff;--note:#6b4e00;--note-bg:#fff;--floor:#c2004f}
body{font-size:11pt}main,header,footer{max-width:none;padding:0}header{padding-top:0}
h2,.lead{break-after:avoid}.lead{break-inside:avoid}.charts{break-inside:avoid}.scroll{overflow:visible}
table{font-size:8.5pt}th,td{padding:3px 4px}details:not([open]){display:none}
figure,.cards li,tr{break-inside:avoid}.slide img,.bar{
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.maps,.charts{grid-template-columns:repeat(3,1fr)}.worst.alone{grid-template-columns:1fr 1fr}
.worst.alone .tile{grid-template-columns:155px 1fr;padding:10px;gap:10px}
.worst.alone dl{font-size:11px}}
"""
