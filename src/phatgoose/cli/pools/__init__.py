"""Commands on pools of experts."""
