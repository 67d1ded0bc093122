"""Folders from and to the Hugging Face Hub.

In: `owner/name[/subfolder][@revision]`. Out: a verified local folder, or one commit on the Hub.
This room knows files only; what the files mean is read by `Expert.load` and `Pool.load`.
"""
