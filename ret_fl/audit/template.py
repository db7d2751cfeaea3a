"""The page of report.html as a jinja2 template.

A Python string, as the style sheet: app bundles of Flower hold .py files, but neither .html nor .css.
"""

PAGE = """\
{% macro chart(c) %}
<figure class="chart">
<figcaption>{{ c.title }}</figcaption>
<div role="img" aria-label="{{ c.title }}. {{ c.alt }}">{{ c.svg }}</div>
{% if c.note %}<p class="note">{{ c.note }}</p>{% endif %}
</figure>
{% endmacro %}
{% macro empty(cell) %}{% if cell == "n/a" %} class="empty"{% endif %}{% endmacro %}
{% macro scrolling(label, header, rows, note="") %}
<div class="scroll" role="region" aria-label="{{ label }}" tabindex="0">
<table class="stack{{ " wide" if header | length > 7 }}">
<thead><tr>{% for name in header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}
<td data-label="{{ header[loop.index] }}"{{ empty(cell) }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% endmacro %}
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
{{ style }}</style>
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
{% if audit.fidelity | selectattr("against", "equalto", "train") | list %}
<p class="caution"><strong>Quality rewards copying here.</strong> No images are held out, so samples are measured
against the training images themselves: a model that copies them all scores best. Hold out some (--held-out).</p>
{% endif %}
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
on; below {{ "%g" | format(threshold) }} the sample counts as a copy.{% endif %}
{%- if audit.replication.worst_variant in ("shift", "flip") %} Both were measured with training and reference images
{{ "moved by up to a pixel" if audit.replication.worst_variant == "shift" else "mirrored where that brings them closer"
}}, as the verdict's copies show so; the training image is shown as it is.{% endif %}</p>
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
{% set found = leak.duplicates %}
{% set below = found.below if found.below is not none else found.suspects | length %}
{% if found.examined is not none %}
<p>Examined: {{ "{:,}".format(found.examined) }} of {{ "{:,}".format(audit.data.distinct) }} distinct training
images.</p>
{% endif %}
{% if found.suspects %}
<p>{{ "{:,}".format(below) }} training {{ "image has" if below == 1 else "images have" }} a loss far below the others',
as images do that are in the data more than once.
{%- if found.precision is not none %}
 {{ found.precision | percent }} of them are in it more than once.
{%- endif %}
{%- if found.recall is not none %}
 Of all examined images that are, {{ found.recall | percent }} are among them.
{%- endif %}
{%- if below > suspects | length %} The first {{ suspects | length }}:{% endif %}</p>
<div class="tiles small">
{% for s in suspects %}
<div>{% if s.image %}<img src="{{ s.image.src }}" alt="{{ s.image.alt }}">{% endif %}
{%- for fact in s.facts %}<p>{{ fact }}</p>{% endfor %}</div>
{% endfor %}
</div>
{% else %}
<p>None has a loss so far below the others' that it looks like a duplicate.</p>
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
  s.floor_percentile_95 | number, s.background_percentile_95 | number, s.above_half | percent,
  s.floor_above_half | percent)) }}
{% endfor %}
{{ scrolling("Similarity in feature models",
  ["features", "mean", "median", "95th percentile", "of real images not trained on",
   "of training images among themselves", "samples above 0.5",
   "real images not trained on above 0.5"], rows) }}
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
