"""The mutation check: break each kernel in one place and see a test turn red.

``python -m tests.mutation`` (or ``make mutate``) copies the project aside, builds it, runs every
named test unbroken, then applies the mutations of ``table.py`` one at a time.
"""
