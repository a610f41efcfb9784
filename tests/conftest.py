"""The tests import the project's files from the folder above; see helpers.py."""

import helpers  # noqa: F401
