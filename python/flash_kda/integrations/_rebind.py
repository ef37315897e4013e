"""Replacing a function of another package in every module that has imported it."""

import sys


class Rebinding:
    """`original` is replaced by `replacement` under every name that a loaded module has for it."""

    def __init__(self, original, replacement):
        self.original, self.replacement = original, replacement
        self._swap(original, replacement)

    def undo(self):
        """Also in modules that have imported the replacement meanwhile."""
        self._swap(self.replacement, self.original)

    @staticmethod
    def _swap(old, new):
        for module in list(sys.modules.values()):
            namespace = getattr(module, "__dict__", None)
            if not isinstance(namespace, dict):
                continue
            for name in [name for name, value in list(namespace.items()) if value is old]:
                setattr(module, name, new)
