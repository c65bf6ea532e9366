"""The page: one jinja2 template, autoescaped, with its style sheet. Nothing is loaded from anywhere."""

# ruff: noqa: E501  a line of the table is a line here

from typing import Final

TEMPLATE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 "DejaVu Sans", Helvetica, Arial, sans-serif; color: #222; background: #fff;
  margin: 0 auto; padding: 28px 28px 80px; max-width: 1120px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 13px; text-transform: uppercase; letter-spacing: .07em; color: #777; margin: 44px 0 2px;
  border-top: 1px solid #ddd; padding-top: 14px; }
.sub { color: #666; margin: 4px 0 18px; }
.finding { font-size: 18px; line-height: 1.4; margin: 2px 0 8px; font-weight: bold; }
.note { color: #666; font-size: 13px; margin: 4px 0; max-width: 92ch; }
.lead { font-size: 19px; line-height: 1.45; margin: 18px 0; }
.warnings { background: #FFF4E5; border-left: 6px solid #D55E00; padding: 10px 18px 10px 16px; margin: 18px 0; }
.warnings b { color: #A03D00; }
.warnings ul { margin: 4px 0 0; padding-left: 20px; }
.warnings li { margin: 2px 0; overflow-wrap: anywhere; }
.headline { font-size: 12px; }
.headline td, .headline th { padding-right: 9px; white-space: normal; }
td.beta { font-size: 17px; }
td .wide { color: #A03D00; font-weight: bold; }
figure { margin: 10px 0 0; }
.views input { margin: 8px 4px 0 0; } .views label { font-size: 12px; color: #666; margin-right: 12px; }
.views .f2, .views .f3 { display: none; }
.views .v2:checked ~ .f1, .views .v3:checked ~ .f1 { display: none; }
.views .v2:checked ~ .f2, .views .v3:checked ~ .f3 { display: block; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th { text-align: left; color: #666; font-weight: normal; border-bottom: 1px solid #bbb; padding: 4px 12px 4px 0;
  vertical-align: bottom; }
td { padding: 3px 12px 3px 0; border-bottom: 1px solid #eee; white-space: nowrap; }
td, th, li, .lead, .finding, .note, summary { unicode-bidi: isolate; }
td.num, th.num { text-align: right; }
td.flag { color: #A03D00; white-space: normal; }
tr.new td { border-top: 1px solid #bbb; }
nav { font-size: 13px; margin: 10px 0; }
nav a { color: #0072B2; text-decoration: none; margin-right: 14px; display: inline-block; }
code { font: 12px "DejaVu Sans Mono", Menlo, monospace; background: #f5f5f5; padding: 1px 4px; overflow-wrap: anywhere; }
.label { display: inline-block; max-width: 40em; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.swatch { display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 2px; }
details summary { cursor: pointer; color: #0072B2; font-size: 13px; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; } body { background: #16181c; color: #ddd; }
  :root { {{ palette }} } figure svg { fill: #ededed; } .views label { color: #aaa; }
  h2, .sub, .note, th { color: #aaa; } .warnings { background: #33291b; }
  code { background: #2a2d33; } td, th { border-color: #3a3d43; } nav a, details summary { color: #6db3e8; }
  .warnings b, td .wide, td.flag { color: #ff9d57; } h2 { border-color: #3a3d43; } }
@page { size: A4; margin: 14mm 12mm; }
@media print { body { font-size: 11px; max-width: none; padding: 0; print-color-adjust: exact; }
  nav, details, .views input, .views label { display: none; } .note, .sub { font-size: 10px; }
  h1 { font-size: 20px; } h2 { font-size: 10px; margin-top: 22px; } .lead, .finding { font-size: 13px; margin: 4px 0 6px; }
  section, figure, tr, .warnings { break-inside: avoid; } #beta_table, #comparisons, #provenance { break-inside: auto; }
  h2, .finding { break-after: avoid; } .scroll { overflow: visible; }
  table, .headline { font-size: 8px; } td.beta { font-size: 10px; } td, th { padding: 2px 5px 2px 0; white-space: normal; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="sub">{{ subtitle }}</p>
{% for sentence in leads %}<p class="lead">{{ prose(sentence) }}</p>{% endfor %}
{% if warnings %}<div class="warnings" role="alert"><b>Read this before quoting a number</b>
<ul>{% for warning in warnings %}<li>{{ prose(warning) }}</li>{% endfor %}</ul></div>{% endif %}
{% if headline %}<div class="scroll"><table class="headline"><thead><tr><th scope="col"></th><th scope="col" class="num">beta</th><th scope="col">95 % CI</th><th scope="col">95 % CI, seeds</th><th scope="col">before decay{{ before_step }}</th><th scope="col" class="num">untrained</th><th scope="col">layers</th><th scope="col">minus {{ reference }}</th><th scope="col">the same before decay</th><th scope="col">over</th></tr></thead>
<tbody>{% for row in headline %}<tr><td><b style="color:{{ ink(row.color, "text") }}">{{ row.name }}</b></td>
<td class="num beta" data-csv="fits.csv" data-row="{{ row.row }}" data-column="beta">{{ row.beta }}</td>
<td>{{ row.ci }}{% if row.wide %} <span class="wide">wide</span>{% endif %}</td><td>{{ row.seeds }}</td><td>{{ row.before or "-" }}</td>
<td class="num" data-csv="fits.csv" data-row="{{ row.row }}" data-column="null_beta">{{ row.null }}</td><td>{{ row.layers }}</td><td>{{ row.gap_0 }}</td><td>{{ row.gap_1 }}</td>
<td>{{ row.n }}{% if row.status != "ok" %} <span class="wide">{{ row.status }}</span>{% endif %}</td></tr>{% endfor %}</tbody></table></div>
<p class="note">beta of {{ headline_what }}; last windows. Before decay: the last windows at the full learning rate. Layers: smallest and largest beta of a layer.</p>{% endif %}
<nav>{% for section in sections %}<a href="#{{ section.key }}">{{ section.title }}</a>{% endfor %}{% if any_fit %}<a href="#beta_table">Table of exponents</a>{% endif %}{% if comparisons %}<a href="#comparisons">Differences</a>{% endif %}<a href="#provenance">Provenance</a></nav>
{% for section in sections %}
<section id="{{ section.key }}"><h2>{{ section.title }}</h2>
<p class="finding">{{ prose(section.headline) }}</p>
{% if section.views %}<div class="views">
{% if section.views|length > 1 %}{% for view in section.views %}<input type="radio" name="{{ section.key }}-x" id="{{ section.key }}-view-{{ loop.index }}" class="v{{ loop.index }}"{% if loop.first %} checked{% endif %}><label for="{{ section.key }}-view-{{ loop.index }}">{{ view.name }}</label>{% endfor %}{% endif %}
{% for view in section.views %}<figure class="f{{ loop.index }}" data-figure="{{ section.key }}" role="img" aria-label="{{ section.headline }}">{{ view.svg }}</figure>{% endfor %}</div>{% endif %}
{% if section.note %}<p class="note">{{ prose(section.note) }}</p>{% endif %}
{% if section.numbers %}<details><summary>Numbers of this figure</summary><div class="scroll"><table class="numbers"><thead><tr><th scope="col">panel</th><th scope="col">series</th><th scope="col" class="num">x</th><th scope="col" class="num">value</th></tr></thead>
<tbody>{% for row in section.numbers %}<tr><th scope="row">{{ row[0] }}</th><td>{{ row[1] }}</td><td class="num">{{ row[2] }}</td><td class="num">{{ row[3] }}</td></tr>{% endfor %}</tbody></table></div></details>{% endif %}
</section>
{% endfor %}
{% if any_fit %}<section id="beta_table"><h2>Table of exponents</h2>
<p class="note">{{ table_note }}</p>
<div class="scroll"><table><thead><tr>
{% for name in fit_names %}<th scope="col">{{ name }}</th>{% endfor %}
<th scope="col" class="num">beta</th><th scope="col">95 % CI</th><th scope="col">status</th><th scope="col">95 % CI, seeds</th><th scope="col">one width left out</th><th scope="col">before decay</th><th scope="col">layers</th><th scope="col" class="num">untrained</th><th scope="col" class="num">ln A</th><th scope="col" class="num">R2</th><th scope="col" class="num">n</th><th scope="col">widths</th><th scope="col">method</th></tr></thead>
<tbody>{% for fit in fits %}<tr{% if fit.new %} class="new"{% endif %}>
{% for cell in fit.cells %}<td>{% if loop.first %}<span class="swatch" style="background:{{ ink(fit.color) }}"></span>{% endif %}<span class="label">{{ cell }}</span></td>{% endfor %}
<td class="num" data-csv="fits.csv" data-row="{{ fit.row }}" data-column="beta">{{ fit.beta }}</td>
<td><span data-csv="fits.csv" data-row="{{ fit.row }}" data-column="ci_low">{{ fit.ci_low }}</span> to <span data-csv="fits.csv" data-row="{{ fit.row }}" data-column="ci_high">{{ fit.ci_high }}</span>{% if fit.wide %} <span class="wide">wide</span>{% endif %}</td>
<td class="{{ '' if fit.status == 'ok' else 'flag' }}">{{ fit.status }}</td><td>{{ fit.seeds }}</td><td>{{ fit.loo }}</td><td>{{ fit.before or "-" }}</td><td>{{ fit.layers }}</td>
<td class="num" data-csv="fits.csv" data-row="{{ fit.row }}" data-column="null_beta">{{ fit.null }}</td>
<td class="num" data-csv="fits.csv" data-row="{{ fit.row }}" data-column="ln_a">{{ fit.ln_a }}</td>
<td class="num" data-csv="fits.csv" data-row="{{ fit.row }}" data-column="r2">{{ fit.r2 }}</td>
<td class="num" data-csv="fits.csv" data-row="{{ fit.row }}" data-column="n">{{ fit.n }}</td>
<td>{{ fit.widths }}</td><td>{{ fit.method }}</td></tr>{% endfor %}</tbody></table></div>
</section>{% endif %}
{% if comparisons %}<section id="comparisons"><h2>Differences</h2>
<p class="finding">{{ prose(comparison_headline) }}</p>
<p class="note">a minus b on {{ focus }}; all of them, with levels, crossovers and the other buckets, are in comparisons.csv. {{ comparisons|length }} differences are shown; p (Holm) is corrected for the pairs of one kind and metric.</p>
<div class="scroll"><table><thead><tr><th scope="col">a</th><th scope="col">b</th><th scope="col">metric</th><th scope="col">kind</th><th scope="col" class="num">estimate</th><th scope="col">95 % CI</th><th scope="col" class="num">p</th><th scope="col" class="num">p (Holm)</th><th scope="col">status</th><th scope="col">note</th></tr></thead>
<tbody>{% for c in comparisons %}<tr><td>{{ c.a }}</td><td>{{ c.b }}</td><td>{{ c.metric }}</td><td>{{ c.kind }}</td>
<td class="num" data-csv="comparisons.csv" data-row="{{ c.row }}" data-column="estimate">{{ c.estimate }}</td><td>{{ c.ci }}</td>
<td class="num" data-csv="comparisons.csv" data-row="{{ c.row }}" data-column="p">{{ c.p }}</td><td class="num" data-csv="comparisons.csv" data-row="{{ c.row }}" data-column="p_holm">{{ c.p_holm }}</td><td class="{{ '' if c.status == 'ok' else 'flag' }}">{{ c.status }}</td><td>{{ c.note }}</td></tr>{% endfor %}</tbody></table></div>
</section>{% endif %}
{% if one_run %}<section id="next"><h2>Next</h2>
<p class="finding">A law needs this run at other widths.</p>
<p class="note">{% if next_command %}<code>{{ next_command }}</code>{% else %}Train the same script at three or more FFN widths, each into its own folder below one folder, and call <code>lightning-spectral report</code> with that.{% endif %}</p></section>{% endif %}
<section id="provenance"><h2>Provenance</h2>
<p class="note">Command: <code>{{ command }}</code><br>Written {{ date }} by lightning-spectral {{ version }}; numpy {{ numpy }}, scipy {{ scipy }}, matplotlib {{ matplotlib }}. Versions of the runs: {{ run_versions }}.</p>
{% for expected in missing %}<p class="note"><b>Missing:</b> {{ expected }}</p>{% endfor %}
<details><summary>{{ runs|length }} run{{ "s" if runs|length != 1 }} read, with the hash of their records</summary>
<div class="scroll"><table><thead><tr>{% for name in run_names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for run in runs %}<tr>{% for cell in run %}<td>{% if loop.index0 == hash_column %}<code title="{{ cell }}">{{ cell[:12] }}</code>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div></details>
</section>
</body>
</html>
"""
