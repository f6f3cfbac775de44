"""Killing a small run again and again: does it always end the same?"""
