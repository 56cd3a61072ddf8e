"""compute-sanitizer over every kernel of the ops.

``python -m tests.sanitize`` runs ``driver.py`` for every op under memcheck, racecheck, synccheck
and initcheck, several processes at once, and prints a table of what they found.
"""
