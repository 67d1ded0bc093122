"""Routing summed up: numbers, cards of experts, and the page that shows them.

In: traces, pools and checked results. Out: numbers, plain data, and one HTML file (templates are the *.j2
files beside).
"""
