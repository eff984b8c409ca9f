"""Wrappers: policies that change how another policy stores or commits."""
