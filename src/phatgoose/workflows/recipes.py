"""The built-in recipes."""

from __future__ import annotations

from dataclasses import replace

from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.workflows.recipe import Recipe

QUICKSTART = Recipe(
    base="smollm2-135m-instruct-q4",
    # Not question_formation: most of its prompts are, to the letter, those of sentence_negation with other answers, so no
    # router without labels can serve both. Not disambiguation_qa among the unseen ones: an expert here works on pronouns.
    pool_tasks=(
        "bigbench:linguistic_mappings/past_tense_json",
        "bigbench:linguistic_mappings/plural_json",
        "bigbench:linguistic_mappings/sentence_negation_json",
        "bigbench:linguistic_mappings/pronoun_replacement_json",
        "bigbench:qa_wikidata",
        "bigbench:intent_recognition",
    ),
    held_out_tasks=(
        "bigbench:sports_understanding",
        "bigbench:hyperbaton",
        "bigbench:hindu_knowledge",
        "bigbench:implicatures",
        "bigbench:metaphor_boolean",
    ),
    # The paper's rank, scale and initialisation. A smaller learning rate than its 5e-3, over 60 steps, gives experts that are no
    # stronger than they need to be: those leave each other alone, and half of one is not enough, which is what a gate learns
    # from (docs/results.md, "What we have seen").
    expert=ExpertConfig(
        rank=16, alpha=1, learning_rate=1e-3, steps=60, rows_per_step=16, rows_per_batch=16, max_length=256,
        validate_every=20, validation_rows=32, save_every=20,
    ),
    gate=GateConfig(
        learning_rate=5e-3, steps=30, rows_per_step=16, rows_per_batch=16, max_length=256,
        validate_every=15, validation_rows=32, save_every=20,
    ),
)  # fmt: skip
"""At most 25 minutes on two CPU cores."""

SMOKE = replace(
    QUICKSTART,
    pool_tasks=QUICKSTART.pool_tasks[:2],
    held_out_tasks=QUICKSTART.held_out_tasks[:1],
    expert=replace(QUICKSTART.expert, steps=4, validate_every=2, validation_rows=8, save_every=2),
    gate=replace(QUICKSTART.gate, steps=3, validate_every=3, validation_rows=8, save_every=2),
    test_rows=8,
    choice_rows=4,
    shown_prompts=2,
)
"""The same code on the same base with two experts and a few steps: shows that all parts work; its numbers mean nothing."""
