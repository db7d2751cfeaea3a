"""The page of report.html as a jinja2 template, and the words that say how each number is computed.

A Python string, because Flower's app bundles hold .py files but no .html.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a number is computed: where from, and what it misses. `key` tells the report whether it is there."""

    key: str
    title: str
    text: str
    source: str
    misses: str


METHODS = (
    Method(
        "copy-rate",
        "Copy rate",
        "A sample counts as a copy if its squared distance to the nearest training image is below a threshold (0.3 as "
        "a rule) times that to the nearest of as many real images that were never trained on. Where real images lie "
        "dense, both distances shrink alike, so the ratio stays fair. The floor is the same share of real held-out "
        "images. Intervals of shares are Wilson's, those of differences bootstrapped, both 95 %.",
        "Calibration by unseen real data as in Meehan et al. 2020 (arXiv 2004.05675); interval: Wilson 1927.",
        "Copies of parts, crops, other colours, or moves by more than a pixel. The interval covers the drawing of "
        "samples; training again with another seed can move the rate further.",
    ),
    Method(
        "memorized",
        "Memorized quantity (MQ)",
        "Share of samples whose squared distance to the nearest training image is below tau times the mean over the "
        "50 nearest. Exact duplicates are removed from the training images first.",
        "IET, arXiv 2407.15328, and AGC, arXiv 2502.09434.",
        "On small or simple images much of it is chance: read it only beside its floor.",
    ),
    Method(
        "carlini",
        "Carlini's ratio",
        "Distance (not squared) to the nearest training image over alpha times the mean distance to the 50 nearest; "
        "at most 1 counts.",
        "Carlini et al. 2023, arXiv 2301.13188.",
        "As MQ, it is not calibrated against real images.",
    ),
    Method(
        "distance",
        "Distance to the training images",
        "Median over samples of the squared pixel distance to the nearest training image, values in [0, 1], summed "
        "over all pixels and channels. Far above that of held-out images, the model has not learned the data.",
        "Sanity check of this audit.",
        "What images look like: blur lies close to everything.",
    ),
    Method(
        "similarity",
        "Similarity in feature models",
        "Cosine similarity of each sample to its most similar training image in the features of an image model; the "
        "95th percentile in SSCD features is the memorization score of work on Stable Diffusion. Background: training "
        "images against all others.",
        "Somepalli et al. 2023, arXiv 2212.03860; SSCD: Pizzi et al. 2022, arXiv 2202.10261.",
        "A common style or class looks similar too; features trained on photographs say little about other images.",
    ),
    Method(
        "fidelity",
        "Fréchet distance, KID, precision, recall",
        "Samples against real images in the features named. Fréchet: distance of fitted Gaussians. KID: unbiased "
        "kernel distance, about 0 for equal distributions. Precision: share of samples within reach of real images; "
        "recall: share of real images within reach of samples, reach being the third nearest neighbour.",
        "Heusel et al. 2017 (arXiv 1706.08500); Binkowski et al. 2018 (arXiv 1801.01401); Kynkäänniemi et al. 2019 "
        "(arXiv 1904.06991).",
        "Copies score well on all four. Below 1000 samples they move with the seed. Values of different features or "
        "sets of images do not compare.",
    ),
    Method(
        "membership",
        "Membership inference",
        "One score for each image, the model's loss on fixed timesteps and noise or the error of the PIA attack, "
        "should not tell training from held-out images: AUC 0.5 is guessing. Members found at few false alarms show "
        "whether single images are exposed even when the average is not.",
        "Yeom et al. 2018 (arXiv 1709.01604); PIA: Kong et al. 2023 (arXiv 2305.18355); low false alarms: Carlini et "
        "al. 2022 (arXiv 2112.03570).",
        "Stronger attacks that train shadow models. With few held-out images, rates at 0.1 % are mostly noise.",
    ),
    Method(
        "exposure",
        "Canary exposure",
        "log2 of the number of compared images less log2 of the canary's rank by loss among images never seen. Without "
        "memorization about 1.44 bits are expected; the most possible is log2 of the number compared.",
        "Carlini et al. 2019, arXiv 1802.08232.",
        "Images less odd than the canaries.",
    ),
    Method(
        "duplicates",
        "Suspected duplicates",
        "Training images whose loss, compared with others at the same timesteps (below 400), is far below the usual. "
        "z counts standard deviations. Copies: exact ones in the data; none found may still mean near-duplicates.",
        "Loss statistics of AGC, arXiv 2502.09434.",
        "Blank or very simple images have low losses too.",
    ),
    Method(
        "skips",
        "Skip rate",
        "Share of training draws left out because their loss was far below the running mean at their timestep.",
        "AGC, arXiv 2502.09434.",
        "It tells what training avoided, not what the model kept.",
    ),
    Method(
        "losses",
        "Loss histograms",
        "Denoising loss of training samples: those of the lowest losses (memorized), of the highest, and the rest.",
        "IET, arXiv 2407.15328.",
        "Groups are chosen by loss, so they differ by construction; look at how far apart they are.",
    ),
)


PAGE = """\
{% macro chart(c) %}
<figure class="chart">
<figcaption>{{ c.title }}</figcaption>
<div role="img" aria-label="{{ c.title }}. {{ c.alt }}">{{ c.svg }}</div>
{% if c.note %}<p class="note">{{ c.note }}</p>{% endif %}
</figure>
{% endmacro %}
{% macro scrolling(label, header, rows, note="") %}
<div class="scroll" role="region" aria-label="{{ label }}" tabindex="0">
<table>
<thead><tr>{% for name in header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% endmacro %}
{% macro empty(cell) %}{% if cell == "n/a" %} class="empty"{% endif %}{% endmacro %}
{% macro facts(values) %}
<dl class="facts">
{% for name, value in values %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Memorization audit of {{ audit.model.name }}</title>
<style>
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

.verdict {
  border-left: .375rem solid var(--tone);
  background: var(--plate);
  border-radius: .25rem;
  padding: 1rem 1.25rem;
}
.verdict b { display: block; color: var(--tone); font-size: .9375rem; margin-bottom: .25rem; }
.verdict p { font-size: 1.25rem; line-height: 1.5; margin: 0; max-width: none; }
.copies { --tone: var(--red); } .maybe { --tone: var(--amber); }
.none { --tone: var(--green); } .unknown { --tone: var(--muted); }

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
  .stack td { display: flex; justify-content: space-between; gap: 1rem; }
  .stack td::before { content: attr(data-label); color: var(--muted); }
  .stack td.empty { display: none; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10.5pt; }
  main, footer { max-width: none; padding: 0; }
  h2, h3, figcaption { break-after: avoid; }
  figure, .card, .tiles > div, .verdict, tr, .facts div, .methods > div { break-inside: avoid; }
  .verdict p { font-size: 12.5pt; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 2mm; }
  .card { padding: 2mm 2.5mm; }
  .card .value { font-size: 14pt; }
  .card p, .card h3 { font-size: 8.5pt; }
  .stack { font-size: 8.5pt; }
  .stack th, .stack td { padding: .25rem .35rem; }
  .charts { grid-template-columns: 1fr 1fr; }
  .charts > .chart, .chart.alone { max-width: 9cm; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .tiles.small { grid-template-columns: repeat(8, 1fr); }
  .sheet { max-width: 11cm; }
  .scroll { overflow: visible; }
  .scroll table { font-size: 7.5pt; }
  .scroll th, .scroll td { padding: .3rem .35rem; white-space: normal; }
  .verdict, img { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
</style>
</head>
<body>
<main>
<h1>Memorization audit of {{ audit.model.name }}</h1>
<div class="verdict {{ finding.name | lower }}">
<b>{{ finding.value | capitalize }}</b>
<p>{{ sentence }}</p>
</div>
{% if audit.warnings %}
{% set count = audit.warnings | length %}
<p class="note"><a href="#warnings">{{ count }} warning{{ "s" if count != 1 }}</a></p>
{% endif %}

<section aria-labelledby="numbers">
<h2 id="numbers">Key numbers</h2>
{% if cards %}
<div class="cards">
{% for card in cards %}
<div class="card"><h3>{{ card.label }}</h3><div class="value">{{ card.value }}</div><p>{{ card.detail }}</p>
{%- for label, value in card.others %}<p>{{ label }} <span class="whole">{{ value }}</span></p>{% endfor %}</div>
{% endfor %}
</div>
{% endif %}
<table class="stack">
<thead><tr><th scope="col">number</th><th scope="col">this model</th><th scope="col">real images in its place</th>
{%- if baseline %}<th scope="col">baseline {{ baseline.model.name }}</th>{% endif %}</tr></thead>
{% for group, rows in key_numbers %}
<tbody class="group">
<tr><th scope="colgroup" colspan="{{ 4 if baseline else 3 }}">{{ group }}</th></tr>
{% for row in rows %}
<tr><th scope="row">{{ row.label }}</th><td data-label="this model">{{ row.value }}</td>
<td data-label="real images"{{ empty(row.floor) }}>{{ row.floor }}</td>
{%- if baseline %}<td data-label="baseline"{{ empty(row.baseline) }}>{{ row.baseline }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
<p class="note">In brackets: 95 % intervals. Real images are held-out ones for copies, and training images put in the
samples' place for quality: what a model that copies everything would score.</p>
{% if rates or quantity %}
<div class="charts">
{% if rates %}{{ chart(rates) }}{% endif %}
{% if quantity %}{{ chart(quantity) }}{% endif %}
</div>
{% endif %}
</section>

{% if pairs or worst_only %}
<section aria-labelledby="worst">
<h2 id="worst">Closest to training images</h2>
<p>Samples that lie closest to a training image, worst first.
{%- if threshold is not none %} Ratio: squared distance to that image over that to the nearest real image never trained
on; below {{ "%g" | format(threshold) }} the sample counts as a copy.{% endif %}</p>
{% if pairs %}
<div class="tiles">
{% for pair in pairs %}
<div><div class="pair"><span>generated</span><span>training</span>
<img src="{{ pair.generated.src }}" alt="{{ pair.generated.alt }}">
<img src="{{ pair.original.src }}" alt="{{ pair.original.alt }}"></div>
{% for fact in pair.facts %}
<p>{% if loop.first and pair.copied %}<span class="is-copy">copy</span>, {% endif %}{{ fact }}</p>
{% endfor %}
</div>
{% endfor %}
</div>
{% else %}
{% set rows = [] %}
{% for w in worst_only %}{{ "" if rows.append((w.sample, w.train, w.ratio | number, w.distance | number)) }}{% endfor %}
{{ scrolling("Samples closest to training images", ["sample", "training image", "ratio", "squared distance"], rows) }}
{% endif %}
</section>
{% endif %}

{% if sheet %}
<section aria-labelledby="samples">
<h2 id="samples">Samples</h2>
<p>The first {{ shown_samples }} of {{ "{:,}".format(audit.model.samples) }} samples, not chosen.</p>
<img class="sheet" src="{{ sheet.src }}" alt="{{ sheet.alt }}">
</section>
{% endif %}

{% if loss_chart or skip_chart %}
<section aria-labelledby="losses">
<h2 id="losses">Losses and skipped draws</h2>
<div class="charts">
{% if loss_chart %}{{ chart(loss_chart) }}{% endif %}
{% if skip_chart %}{{ chart(skip_chart) }}{% endif %}
</div>
</section>
{% endif %}

{% if movement %}
<section aria-labelledby="movement">
<h2 id="movement">Movement between shards</h2>
<div class="charts">{% for c in movement %}{{ chart(c) }}{% endfor %}</div>
</section>
{% endif %}

{% if curves or audit.training %}
<section aria-labelledby="training">
<h2 id="training">Training</h2>
{% if audit.training %}
{% set t = audit.training %}
{{ facts([
  ("rounds", "{:,}".format(t.rounds)), ("images trained on", "{:,}".format(t.images)),
  ("samples moved between shards", "{:,}".format(t.moved)), ("draws skipped", t.skip_rate | percent),
  ("failed shard rounds", "{:,}".format(t.failures)),
  ("final loss, training / held-out images", (t.final_train_loss | number) ~ " / " ~ (t.final_held_out_loss | number)),
]) }}
{% endif %}
{% if curves %}<div class="charts">{% for c in curves %}{{ chart(c) }}{% endfor %}</div>{% endif %}
</section>
{% endif %}

{% if audit.leakage %}
{% set leak = audit.leakage %}
<section aria-labelledby="leakage">
<h2 id="leakage">What the model gives away of its training data</h2>
{% if leak.membership %}
{% set rows = [] %}
{% for m in leak.membership %}
{{ "" if rows.append((
  {"loss": "loss", "pia": "PIA"}[m.attack], "{:,}".format(m.members), "{:,}".format(m.non_members), m.auc | interval,
  m.tpr_at_1_percent | share, m.tpr_at_01_percent | share)) }}
{% endfor %}
<h3>Membership</h3>
{{ scrolling("Membership inference",
  ["attack", "members", "others", "AUC", "found at 1 % false alarms", "found at 0.1 % false alarms"], rows) }}
{% endif %}
{% if leak.exposure %}
<h3>Canaries</h3>
<p>{{ leak.exposure.exposures | length }} canaries have a mean exposure of {{ leak.exposure.mean | number }} bits; the
most exposed has {{ leak.exposure.exposures | max | number }}, of {{ leak.exposure.most | number }} at most. Without
memorization about 1.44 are expected.</p>
{% endif %}
{% if leak.duplicates %}
<h3>Suspected duplicates</h3>
{% if leak.duplicates.suspects %}
<p>{{ leak.duplicates.suspects | length }} training images have a loss far below the others', as images do that are in
the data more than once.
{%- if leak.duplicates.precision is not none %}
 {{ leak.duplicates.precision | percent }} of them are in it more than once.
{%- endif %}
{%- if leak.duplicates.recall is not none %}
 Of all images that are, {{ leak.duplicates.recall | percent }} are among them.
{%- endif %}
{%- if leak.duplicates.suspects | length > suspects | length %} The first {{ suspects | length }}:{% endif %}</p>
<div class="tiles small">
{% for s in suspects %}
<div>{% if s.image %}<img src="{{ s.image.src }}" alt="{{ s.image.alt }}">{% endif %}
{%- for fact in s.facts %}<p>{{ fact }}</p>{% endfor %}</div>
{% endfor %}
</div>
{% else %}
<p>No training image has a loss so far below the others' that it looks like a duplicate.</p>
{% endif %}
{% endif %}
</section>
{% endif %}

{% if audit.similarity %}
<section aria-labelledby="similarity">
<h2 id="similarity">Similarity in feature models</h2>
{% set rows = [] %}
{% for s in audit.similarity %}
{{ "" if rows.append((s.features, s.mean | number, s.percentile_50 | number, s.percentile_95 | number,
  s.floor_percentile_95 | number, s.background_percentile_95 | number, s.above_half | percent)) }}
{% endfor %}
{{ scrolling("Similarity in feature models",
  ["features", "mean", "median", "95th percentile", "of held-out images", "of training images among themselves",
   "samples above 0.5"], rows) }}
</section>
{% endif %}

{% if compared or planes %}
<section aria-labelledby="comparison">
<h2 id="comparison">Comparison</h2>
{% if compared %}
{{ scrolling("Comparison of audits", compared_names, compared,
  "Fewer or more copies only where the 95 % intervals do not overlap. They cover the drawing of samples, not the "
  "training seed.") }}
{% endif %}
{% if planes %}
<h3>The copy-quality plane</h3>
<p>A method is better than training less only if it lies on the good side of the curve of one training stopped earlier
and earlier: fewer copies alone can mean that less was learned.</p>
<div class="charts">{% for c in planes %}{{ chart(c) }}{% endfor %}</div>
{% endif %}
</section>
{% endif %}

{% if audit.warnings %}
<section aria-labelledby="warnings">
<h2 id="warnings">Warnings</h2>
<ul class="warnings">{% for w in audit.warnings %}<li>{{ w }}</li>{% endfor %}</ul>
</section>
{% endif %}

<section aria-labelledby="settings">
<h2 id="settings">Settings</h2>
{% for title, values in settings %}
<h3>{{ title }}</h3>
{{ facts(values) }}
{% endfor %}
</section>

<section aria-labelledby="methods">
<h2 id="methods">How the numbers are computed</h2>
<div class="methods">
{% for m in methods %}
<div><h3>{{ m.title }}</h3>
<p>{{ m.text }}</p>
<p><strong>Misses:</strong> {{ m.misses }}</p>
<p class="note">{{ m.source }}</p></div>
{% endfor %}
</div>
</section>
</main>
<footer>Made by ret-fl. Every number is in audit.json.</footer>
</body>
</html>
"""
