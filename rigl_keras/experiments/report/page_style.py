"""How the page looks: on a phone, in the dark, and on paper."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --faint: #595959;
  --rule: #ddd; --strong: #555; --shade: #f5f5f5; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e4e4; --faint: #a6a6a6; --rule: #393c41;
    --strong: #8c8f94; --shade: #212429; --link: #7fb8f0; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
a { color: var(--link); }
nav { background: var(--shade); padding: .5rem 1rem; }
nav ul { columns: 18rem 2; margin: 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem;
  margin: .5rem 0 1.2rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--strong); vertical-align: bottom;
  white-space: normal; }
tbody td, tbody th { border-bottom: 1px solid var(--rule); }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
tbody th { font-weight: normal; }
tr.group th { font-style: italic; color: var(--faint); padding-top: .6rem; }
summary { cursor: pointer; padding: .4rem 0; color: var(--link); }
pre { background: var(--shade); padding: .6rem .8rem; overflow-x: auto;
  font-size: .85rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figcaption { font-size: .8rem; color: var(--faint); position: sticky; left: 0; }
img { max-width: 100%; height: auto; vertical-align: top; cursor: zoom-in; }
.larger input { position: absolute; opacity: 0; }
.larger input:focus-visible + img { outline: 2px solid var(--link); }
.larger input:checked + img { max-width: none; cursor: zoom-out; }
ol.notes, ul.items { font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .7rem; }
  h1 { font-size: 1.5rem; }
  h2 { font-size: 1.25rem; margin-top: 2rem; }
  nav ul { padding-left: 1rem; }
  nav li { padding: .3rem 0; }
  th:first-child { max-width: 45vw; min-width: 8rem; white-space: normal; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --faint: #444; --rule: #ccc; }
  body { max-width: none; margin: 0; font-size: 10pt; }
  nav, figcaption { display: none; }
  .wide { overflow: visible; }
  img { max-height: 18cm; filter: none; }
  figure, tr, h2, caption { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .1rem .4rem; }
}
"""
