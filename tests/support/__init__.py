"""Helpers of the tests, imported by their full names, also by the processes that tests start."""
