"""`phatgoose ui`: a page on this machine that shows an answer's routing while it is written."""
