"""The report's HTML, filled by jinja2 with autoescaping."""

__all__ = ["TEMPLATE"]

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>latent-rl demo</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #202124; }
  h1, h2 { line-height: 1.2; }
  table { border-collapse: collapse; margin: 1rem 0; }
  th, td { padding: .3rem .7rem; border-bottom: 1px solid #dadce0; text-align: right; vertical-align: top; }
  th:nth-child(-n+2), td:nth-child(-n+2), .left td, .left th { text-align: left; }
  img.wide { max-width: 100%; }
  .talk { display: flex; gap: 1rem; border-top: 1px solid #dadce0; padding: 1rem 0; }
  .talk img { width: 96px; height: 96px; image-rendering: pixelated; }
  .prompt { white-space: pre-wrap; color: #5f6368; }
  .codes { color: #5f6368; font-size: 85%; }
</style>
</head>
<body>
<h1>latent-rl demo</h1>
<p>{{ caption }}.</p>
<table>
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>SFT is the base model that both RL arms start from. The cloned policy is the latent policy before RL. In
distribution: held-out pictures, known personas and role sets. Out of distribution: held-out pictures and held-out
personas and role sets. Both arms had {{ budget }} rollouts a task.</p>
<img class="wide" alt="training rewards, final rewards, use of codes" src="data:image/png;base64,{{ picture }}">

<h2>Does the world model listen to its codes?</h2>
<table class="left">
<tr><th>cross-entropy, nats per response token</th><th>value</th></tr>
<tr><td>base model, no codes</td><td>{{ "%.3f"|format(world_model.base) }}</td></tr>
<tr><td>under the inverse model's code, which has seen the token</td><td>{{ "%.3f"|format(world_model.inverse) }}</td></tr>
<tr><td>under random codes</td><td>{{ "%.3f"|format(world_model.random) }}</td></tr>
<tr><td>of the cloned policy's mixture over codes</td><td>{{ "%.3f"|format(world_model.marginal) }}</td></tr>
</table>
<p>Random codes far above the inverse model's mean that codes steer what is said.</p>

<h2>What the codes stand for</h2>
<p>{{ code_tokens|length }} of {{ num_codes }} codes occur on held-out ideal answers; the tokens each explains most.</p>
<table class="left">
<tr><th>code</th><th>tokens</th></tr>
{% for code, tokens in code_tokens %}<tr><td>{{ code }}</td><td>{% for token in tokens %}<code>{{ token }}</code> {% endfor %}</td></tr>
{% endfor %}</table>

<h2>Conversations</h2>
{% for talk in conversations %}<div class="talk">
<img alt="the picture" src="data:image/png;base64,{{ talk.image }}">
<div><b>{{ talk.task }}, {{ talk.split }}</b>
<div class="prompt">{{ talk.prompt }}</div>
<table class="left">{% for answer in talk.answers %}<tr><td>{{ answer.arm }}</td><td>{{ answer.text }}
{% if answer.codes %}<div class="codes">codes {{ answer.codes|join(" ") }}</div>{% endif %}</td><td>{{ answer.reward }}</td></tr>
{% endfor %}</table></div></div>
{% endfor %}
<h2>Training losses</h2>
<img class="wide" alt="training losses" src="data:image/png;base64,{{ losses }}">

<h2>Where the time went</h2>
<table class="left">
<tr><th>step</th><th>seconds</th></tr>
{% for name, value in seconds.items() %}<tr><td>{{ name }}</td><td>{{ "%.1f"|format(value) }}</td></tr>
{% endfor %}<tr><td>total</td><td>{{ "%.1f"|format(total_seconds) }}</td></tr>
</table>
<h2>Settings and machine</h2>
<table class="left">
{% for name, value in settings.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}{% for name, value in machine.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</body>
</html>
"""
