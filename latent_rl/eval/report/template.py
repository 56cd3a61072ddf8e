"""The pages' HTML, filled by jinja2 with autoescaping."""

__all__ = ["TEMPLATES"]

_BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d1d9e0; --page: #ffffff; --soft: #f3f5f7; --warn: #8a4600; --good: #0b6b3a; --bad: #b3261e; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #a8b0b8; --line: #3a4149; --page: #14171a; --soft: #1e2328; --warn: #f0b46a; --good: #6fd199; --bad: #ff9a90; } }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: var(--ink); background: var(--page); }
  h1, h2, h3 { line-height: 1.2; }
  h2 { margin-top: 2.5rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
  caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
  th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
  td.number { text-align: right; white-space: nowrap; }
  th.number { text-align: right; }
  .dim { color: var(--dim); font-size: 90%; }
  .better { color: var(--good); font-weight: 600; }
  .worse { color: var(--bad); font-weight: 600; }
  .warnings { border-left: 4px solid var(--warn); padding: .2rem 1rem; background: var(--soft); }
  .warnings li { color: var(--warn); }
  figure { margin: 0 0 1rem; }
  figure svg { width: 100%; height: auto; }
  figure img { max-width: 100%; }
  article { border-top: 1px solid var(--line); padding: 1rem 0; }
  article .images { display: flex; gap: .5rem; flex-wrap: wrap; margin-bottom: .5rem; }
  article .images img { max-width: 192px; max-height: 192px; image-rendering: pixelated; }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; }
  .prompt { color: var(--dim); margin: 0 0 .5rem; }
  summary { cursor: pointer; }
  code { background: var(--soft); padding: 0 .25em; white-space: pre-wrap; }
  mark { background: var(--warn); color: var(--page); }
</style>
</head>
<body>
<main>
{% block body %}{% endblock %}
</main>
</body>
</html>
"""

_MACROS = """{% macro folded(text, limit=600) -%}
{% if text|length > limit %}<details><summary class="text">{{ text[:limit // 3] }}… <span class="dim">({{ text|length }} characters)</span></summary><div class="text">{{ text }}</div></details>{% else %}<div class="text">{{ text }}</div>{% endif %}
{%- endmacro %}
{% macro interval(value) -%}
{% if value is none %}<span class="dim">–</span>{% else %}{{ number(value.mean) }}{% if value.low == value.low %} <span class="dim">[{{ number(value.low) }}, {{ number(value.high) }}]</span>{% endif %}{% endif %}
{%- endmacro %}
{% macro warnings(texts) -%}
{% if texts %}<div class="warnings" role="note"><p><b>Read with care</b></p><ul>{% for text in texts %}<li>{{ text }}</li>{% endfor %}</ul></div>{% endif %}
{%- endmacro %}
{% macro plot(picture, label) -%}
<figure role="img" aria-label="{{ label }}">{{ picture }}</figure>
{%- endmacro %}
"""

_COMPARISON = """{% import "macros" as m with context %}
{% macro comparison(found) -%}
{{ m.warnings(found.warnings) }}
{% for split, rows in found.splits.items() %}
<h3>{{ split_title(split) }}</h3>
<div class="scroll"><table>
<caption>Mean over prompts with its 95 % interval; below it the difference to {{ found.names[0] }} over the prompts both have. Coloured differences exclude 0.</caption>
<thead><tr><th scope="col">metric</th>{% for name in found.names %}<th scope="col" class="number">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><th scope="row">{{ row.metric }}</th>{% for value in row.values %}{% set difference = row.differences[loop.index0] %}<td class="number">{{ m.interval(value) }}{% if difference is not none %}<br><span class="{{ verdict(row.metric, difference) }}">{{ "%+.3f"|format(difference.mean) }}</span>{% if difference.low == difference.low %} <span class="dim">[{{ "%+.3f"|format(difference.low) }}, {{ "%+.3f"|format(difference.high) }}]</span>{% endif %}{% endif %}</td>{% endfor %}</tr>
{% endfor %}<tr><th scope="row">answers, dropped</th>{% for summary in found.summaries %}<td class="number">{% if split in summary %}{{ summary[split].answers }}, {{ summary[split].dropped }}{% else %}–{% endif %}</td>{% endfor %}</tr>
<tr><th scope="row">code perplexity; share used</th>{% for summary in found.summaries %}<td class="number">{% if split in summary and summary[split].usage %}{{ "%.1f"|format(summary[split].usage.perplexity) }}; {{ "%.0f"|format(100 * summary[split].usage.share) }} %{% else %}–{% endif %}</td>{% endfor %}</tr>
</tbody></table></div>
{% endfor %}
{%- endmacro %}
"""

_COMPARE_PAGE = """{% extends "base" %}
{% import "comparison" as c with context %}
{% block body %}
<h1>{{ title }}</h1>
{{ c.comparison(found) }}
<h2>What was compared</h2>
{% for evaluation in evaluations %}{{ about(evaluation, found.names[loop.index0]) }}{% endfor %}
{% endblock %}
"""

_ABOUT = """<details><summary>{{ name }}: {{ evaluation.settings.samples }} samples a prompt at T={{ evaluation.settings.temperature }}, seed {{ evaluation.settings.seed }}</summary>
<table>
{% for key, value in facts %}<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></details>
"""

_EVALUATION = """{% import "macros" as m with context %}
{% macro metrics(evaluation, summaries) -%}
<div class="scroll"><table>
<caption>Mean over prompts with its 95 % interval over prompts; {{ evaluation.settings.samples }} answers a prompt at T={{ evaluation.settings.temperature }}.</caption>
<thead><tr><th scope="col">metric</th>{% for split in summaries %}<th scope="col" class="number">{{ split_title(split) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for metric in metric_names(summaries) %}<tr><th scope="row">{{ metric }}</th>{% for summary in summaries.values() %}<td class="number">{{ m.interval(summary.metrics.get(metric)) }}</td>{% endfor %}</tr>
{% endfor %}<tr><th scope="row">prompts; answers</th>{% for summary in summaries.values() %}<td class="number">{{ summary.prompts }}; {{ summary.answers }}</td>{% endfor %}</tr>
<tr><th scope="row">answers dropped (a reward failed)</th>{% for summary in summaries.values() %}<td class="number">{{ summary.dropped }} ({{ summary.failed }})</td>{% endfor %}</tr>
{% if evaluation.num_codes %}<tr><th scope="row">code perplexity, of {{ evaluation.num_codes }}</th>{% for summary in summaries.values() %}<td class="number">{% if summary.usage %}{{ "%.1f"|format(summary.usage.perplexity) }}{% else %}–{% endif %}</td>{% endfor %}</tr>
<tr><th scope="row">codes used</th>{% for summary in summaries.values() %}<td class="number">{% if summary.usage %}{{ summary.usage.used }} ({{ "%.0f"|format(100 * summary.usage.share) }} %){% else %}–{% endif %}</td>{% endfor %}</tr>{% endif %}
</tbody></table></div>
{%- endmacro %}
{% macro world(reports) -%}
{% if reports %}<h3>Does the world model listen to its codes?</h3>
<div class="scroll"><table>
<caption>Cross-entropy in nats per response token of held-out conversations. Random codes far above the inverse model's mean that codes steer what is said.</caption>
<thead><tr><th scope="col"></th>{% for split in reports %}<th scope="col" class="number">{{ split_title(split) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for key, label in (("base", "base model, no codes"), ("inverse", "under the inverse model's code, which has seen the token"), ("random", "under random codes"), ("marginal", "of the policy's mixture over codes")) %}<tr><th scope="row">{{ label }}</th>{% for report in reports.values() %}<td class="number">{{ "%.3f"|format(report[key]) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{%- endmacro %}
{% macro codes(uses, effects) -%}
{% if uses %}<h3>What the codes said</h3>
<div class="scroll"><table>
<caption>In sampled answers: tokens that set a code apart, with P(token | code) / P(token), and places where it acted.{% if effects %} Effect: tokens whose probability the code raises most on held-out states.{% endif %}</caption>
<thead><tr><th scope="col">code</th><th scope="col" class="number">tokens</th><th scope="col">sets apart (lift)</th>{% if effects %}<th scope="col">effect</th>{% endif %}<th scope="col">examples</th></tr></thead>
<tbody>
{% for use in uses[:64] %}<tr><th scope="row">{{ use.code }}</th><td class="number">{{ use.count }}</td>
<td>{% for token in use.tokens %}<code>{{ token.token }}</code> <span class="dim">{{ "%.1f"|format(token.lift) }}</span> {% endfor %}</td>
{% if effects %}<td>{% for token in effects.get(use.code, ()) %}<code>{{ token }}</code> {% endfor %}</td>{% endif %}
<td>{% for example in use.examples %}<div class="text">{{ example.before }}<mark>{{ example.token }}</mark>{{ example.after }}</div>{% endfor %}</td></tr>
{% endfor %}</tbody></table></div>
{% if uses|length > 64 %}<p class="dim">{{ uses|length - 64 }} rarer codes are in the JSON.</p>{% endif %}{% endif %}
{%- endmacro %}
{% macro conversations(splits, shown, rewards) -%}
<h3>Conversations</h3>
{% for split, record in splits.items() %}{% for prompt in record.prompts[:shown] %}
<article aria-label="{{ split_title(split) }}, conversation {{ loop.index }}">
<p class="dim">{{ split_title(split) }}, {{ loop.index }}</p>
{% if prompt.thumbnails %}<div class="images">{% for image in prompt.thumbnails[:4] %}<img src="{{ image }}" alt="image {{ loop.index }} of the prompt">{% endfor %}{% if prompt.thumbnails|length > 4 %}<span class="dim">and {{ prompt.thumbnails|length - 4 }} more</span>{% endif %}</div>{% endif %}
<div class="prompt">{{ m.folded(cap(prompt.prompt)) }}</div>
{% if prompt.greedy %}{{ said("T=0", prompt.greedy, rewards) }}{% endif %}
{{ said("sample 1", prompt.samples[0], rewards) }}
{% if prompt.samples|length > 1 %}<details><summary>{{ prompt.samples|length - 1 }} more samples</summary>{% for sample in prompt.samples[1:] %}{{ said("sample " ~ (loop.index + 1), sample, rewards) }}{% endfor %}</details>{% endif %}
</article>
{% endfor %}{% endfor %}
{%- endmacro %}
{% macro said(label, scored, rewards) -%}
<div><b>{{ label }}</b> <span class="dim">{% if scored.reward is none %}no reward{% if scored.failed %} (failed){% endif %}{% else %}reward {{ number(scored.reward) }}{% endif %}{% if rewards|length > 1 %}: {% for reward in rewards %}{% set score = scored.scores[loop.index0] %}{{ reward.name }} {{ "–" if score is none else number(score) }}{{ ", " if not loop.last }}{% endfor %}{% endif %}{{ "" if scored.answer.finished else "; cut at the length limit" }}</span>
{{ m.folded(cap(scored.answer.text)) }}
{% if scored.answer.codes %}<details class="dim"><summary>{{ scored.answer.codes|length }} codes</summary>{{ scored.answer.codes[:512]|join(" ") }}</details>{% endif %}</div>
{%- endmacro %}
"""

_RUN_PAGE = """{% extends "base" %}
{% import "macros" as m with context %}
{% import "comparison" as c with context %}
{% import "evaluation" as e with context %}
{% block body %}
<h1>{{ title }}</h1>
{% if compared %}<h2>Side by side</h2>
{{ c.comparison(compared) }}{% endif %}
{% for part in parts %}
<h2>{{ part.name }}</h2>
{{ m.warnings(part.warnings) }}
{{ e.metrics(part.evaluation, part.summaries) }}
{{ about(part.evaluation, part.name) }}
{% if part.usage %}<h3>Use of the codebook</h3>
{{ m.plot(part.usage, "share of each code, most used first, by split") }}{% endif %}
{{ e.world(part.evaluation.world_model) }}
{{ e.codes(part.evaluation.code_uses, part.effects) }}
{{ e.conversations(part.evaluation.splits, part.evaluation.settings.shown, part.evaluation.rewards) }}
{% endfor %}
{% if histories %}<h2>Training</h2>
{% for history in histories %}<h3>{{ history.name }}</h3>
{{ m.plot(history.picture, "training curves of " ~ history.name ~ ": " ~ history.labels|join(", ")) }}
{% if history.left_out %}<p class="dim">{{ history.left_out }} more logged numbers are in the log.</p>{% endif %}
{% endfor %}{% endif %}
{% endblock %}
"""

TEMPLATES = {
    "base": _BASE,
    "macros": _MACROS,
    "comparison": _COMPARISON,
    "evaluation": _EVALUATION,
    "about": _ABOUT,
    "compare_page": _COMPARE_PAGE,
    "run_page": _RUN_PAGE,
}
