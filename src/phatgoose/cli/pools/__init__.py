"""Commands on pools of experts: make, change, check, pack, publish and fetch them.

In: experts' folders or Hub repositories. Out: a pool's folder.
"""
