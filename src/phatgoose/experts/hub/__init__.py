"""Folders from and to the Hugging Face Hub.

In: `owner/name[@revision][:subfolder]`. Out: a verified local folder, or one commit on the Hub.
This room works on files only; `Expert.load` and `Pool.load` read what they mean.
"""
