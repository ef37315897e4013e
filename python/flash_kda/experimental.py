"""Functions that may change or go in any release."""

from ._C import summary

__all__ = ["summary"]
