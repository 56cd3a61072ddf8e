"""The demo's page, an extension of the reports' base page."""

__all__ = ["TEMPLATE"]

TEMPLATE = """{% extends "base" %}
{% import "macros" as m with context %}
{% block body %}
<h1>{{ title }}</h1>
<p>{{ caption }}.</p>
<table>
<tr>{% for heading in headings %}<th scope="col"{% if loop.index > 2 %} class="number"{% endif %}>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td{% if loop.index > 2 %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>SFT is the base model that both RL arms start from. The cloned policy is the latent policy before RL. In
distribution: held-out pictures, known personas and role sets. Out of distribution: held-out pictures and held-out
personas and role sets. Both arms had {{ budget }} rollouts a task.</p>
{{ m.plot(picture, "training rewards, final rewards, use of codes") }}

<h2>Does the world model listen to its codes?</h2>
<table>
<tr><th scope="col">cross-entropy, nats per response token</th><th scope="col" class="number">value</th></tr>
<tr><td>base model, no codes</td><td>{{ "%.3f"|format(world_model.base) }}</td></tr>
<tr><td>under the inverse model's code, which has seen the token</td><td>{{ "%.3f"|format(world_model.inverse) }}</td></tr>
<tr><td>under random codes</td><td>{{ "%.3f"|format(world_model.random) }}</td></tr>
<tr><td>of the cloned policy's mixture over codes</td><td>{{ "%.3f"|format(world_model.marginal) }}</td></tr>
</table>
<p>Random codes far above the inverse model's mean that codes steer what is said.</p>

<h2>What the codes stand for</h2>
<p>{{ code_tokens|length }} of {{ num_codes }} codes occur on held-out ideal answers; the tokens each explains most.</p>
<table>
<tr><th scope="col">code</th><th scope="col">tokens</th></tr>
{% for code, tokens in code_tokens %}<tr><td>{{ code }}</td><td>{% for token in tokens %}<code>{{ token }}</code> {% endfor %}</td></tr>
{% endfor %}</table>

<h2>Conversations</h2>
{% for talk in conversations %}<article>
<div class="images"><img alt="the picture" src="{{ talk.image }}"></div>
<div><b>{{ talk.task }}, {{ talk.split }}</b>
<div class="prompt">{{ m.folded(talk.prompt) }}</div>
<table>{% for answer in talk.answers %}<tr><td>{{ answer.arm }}</td><td>{{ answer.text }}
{% if answer.codes %}<div class="dim">codes {{ answer.codes|join(" ") }}</div>{% endif %}</td><td>{{ answer.reward }}</td></tr>
{% endfor %}</table></div></article>
{% endfor %}
<h2>Training losses</h2>
{{ m.plot(losses, "training losses") }}

<h2>Where the time went</h2>
<table>
<tr><th scope="col">step</th><th scope="col">seconds</th></tr>
{% for name, value in seconds.items() %}<tr><td>{{ name }}</td><td>{{ "%.1f"|format(value) }}</td></tr>
{% endfor %}<tr><td>total</td><td>{{ "%.1f"|format(total_seconds) }}</td></tr>
</table>
<h2>Settings and machine</h2>
<table>
{% for name, value in settings.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}{% for name, value in machine.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% endblock %}
"""
