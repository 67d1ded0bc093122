"""`phatgoose ui`: a page that shows which experts act on each token of an answer.

In: a base and a pool, and questions from a browser on this machine. Out: the page, and events of each answer
as lines of JSON.
"""
