"""Hostile inputs to whole commands: broken model folders, odd recipes, kills at any moment.

Each case must end in the right answer or in one refusal. `make test` runs a seeded few; `make attack` runs hundreds.
"""
