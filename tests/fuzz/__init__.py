"""Every parser of foreign bytes, fed with bytes that nobody meant.

A target takes bytes and ends: with a result, or with a `UserError`. `make test` gives each some hundred seeded inputs
and every input that was ever found to break one (`corpus/`); `make fuzz` lets atheris look for new ones by coverage.
"""
