"""Experts on BIG-bench's JSON tasks outside BIG-bench Hard and BIG-bench Lite, without near-duplicates of their tasks.

Chosen for a small base: English, rows short enough for 512 tokens, at least 200 of them. Tasks in many parts of one kind are one expert.
"""

from __future__ import annotations

from phatgoose.tasks.lists.entries import Entry

SINGLE = [
    "qa_wikidata",
    "word_unscrambling",
    "social_iqa",
    "epistemic_reasoning",
    "social_support",
    "discourse_marker_prediction",
    "presuppositions_as_nli",
    "intent_recognition",
    "metaphor_boolean",
    "implicatures",
    "auto_categorization",
    "analogical_similarity",
    "tense",
    "anachronisms",
    "physics",
    "moral_permissibility",
    "fantasy_reasoning",
    "international_phonetic_alphabet_transliterate",
    "cryptonite",
    "matrixshapes",
    "list_functions",
    "mult_data_wrangling",
]
NATURAL_INSTRUCTIONS = [
    "023_cosmosqa_question_generation",
    "024_cosmosqa_answer_generation",
    "025_cosmosqa_incorrect_answer_generation",
    "037_qasc_generate_related_fact",
    "038_qasc_combined_fact",
    "039_qasc_find_overlapping_words",
    "040_qasc_question_generation",
    "041_qasc_answer_generation",
    "042_qasc_incorrect_option_generation",
    "046_miscellaenous_question_typing",
    "050_multirc_answerability",
    "051_multirc_correct_answer_single_sentence",
    "044_essential_terms_identifying_essential_words",
    "043_essential_terms_answering_incomplete_questions",
    "019_mctaco_temporal_reasoning_category",
    "018_mctaco_temporal_reasoning_presence",
    "021_mctaco_grammatical_logical",
    "022_cosmosqa_passage_inappropriate_binary",
    "036_qasc_topic_word_to_generate_related_fact",
]
PARTS = {
    "abstract_narrative_understanding": """
        abstract_narrative_understanding/4_distractors abstract_narrative_understanding/99_distractors
        abstract_narrative_understanding/9_distractors
    """,
    "metaphor_understanding": """
        metaphor_understanding/lit2met metaphor_understanding/met2lit
    """,
    "multiemo_en_sentence": """
        multiemo/all_sentence_en
    """,
    "fact_checker_politifact": """
        fact_checker/politifact
    """,
    "wikihow_goal_inference": """
        goal_step_wikihow/goal_inference
    """,
    "wikihow_step_inference": """
        goal_step_wikihow/step_inference
    """,
    "wikihow_step_ordering": """
        goal_step_wikihow/step_ordering
    """,
    "linguistic_question_formation": """
        linguistic_mappings/question_formation_json
    """,
    "linguistic_sentence_negation": """
        linguistic_mappings/sentence_negation_json
    """,
    "linguistic_past_tense": """
        linguistic_mappings/past_tense_json
    """,
    "linguistic_plural": """
        linguistic_mappings/plural_json
    """,
    "linguistic_pronoun_replacement": """
        linguistic_mappings/pronoun_replacement_json
    """,
    "pig_latin": """
        language_games/pig_latin_encode language_games/pig_latin_decode
    """,
    "arithmetic_addition": """
        arithmetic/2_digit_addition arithmetic/3_digit_addition arithmetic/4_digit_addition
        arithmetic/5_digit_addition arithmetic/1_digit_addition
    """,
    "arithmetic_subtraction": """
        arithmetic/2_digit_subtraction arithmetic/3_digit_subtraction arithmetic/4_digit_subtraction
        arithmetic/5_digit_subtraction arithmetic/1_digit_subtraction
    """,
    "arithmetic_multiplication": """
        arithmetic/2_digit_multiplication arithmetic/3_digit_multiplication arithmetic/4_digit_multiplication
        arithmetic/5_digit_multiplication arithmetic/1_digit_multiplication
    """,
    "arithmetic_division": """
        arithmetic/4_digit_division arithmetic/5_digit_division arithmetic/3_digit_division
        arithmetic/2_digit_division arithmetic/1_digit_division
    """,
    "modified_arithmetic": """
        modified_arithmetic/three_digit_addition_control modified_arithmetic/three_digit_addition_plus_one
        modified_arithmetic/three_digit_subtraction_control modified_arithmetic/three_digit_subtraction_plus_one
        modified_arithmetic/two_digit_multiplication_control
        modified_arithmetic/two_digit_multiplication_plus_one
    """,
    "unit_conversion_mc": """
        unit_conversion/si_conversion unit_conversion/different_systems unit_conversion/chained_conversion
    """,
    "unit_identification": """
        unit_conversion/unit_identification
    """,
    "unit_addition": """
        unit_conversion/unit_addition_same unit_conversion/unit_addition_general
    """,
    "elementary_math_qa": """
        elementary_math_qa/question_only
    """,
    "dates": """
        unnatural_in_context_learning/dates
    """,
    "periodic_elements": """
        periodic_elements/subtask_1
    """,
    "color_rgb_hex": """
        color/rgb color/hex
    """,
    "chess_state_short": """
        chess_state_tracking/real_short chess_state_tracking/synthetic_short
    """,
    "gem_e2e_nlg": """
        gem/e2e_nlg
    """,
    "gem_web_nlg": """
        gem/webnlg_en
    """,
    "gem_common_gen": """
        gem/common_gen
    """,
    "gem_simplification": """
        gem/asset gem/turk
    """,
    "ni_mctaco_answer_generation": """
        natural_instructions/subtask004_mctaco_answer_generation_event_duration
        natural_instructions/subtask010_mctaco_answer_generation_event_ordering
        natural_instructions/subtask016_mctaco_answer_generation_frequency
        natural_instructions/subtask013_mctaco_answer_generation_absolute_timepoint
        natural_instructions/subtask007_mctaco_answer_generation_transient_stationary
    """,
    "ni_mctaco_question_generation": """
        natural_instructions/subtask003_mctaco_question_generation_event_duration
        natural_instructions/subtask015_mctaco_question_generation_frequency
        natural_instructions/subtask012_mctaco_question_generation_absolute_timepoint
        natural_instructions/subtask009_mctaco_question_generation_event_ordering
        natural_instructions/subtask006_mctaco_question_generation_transient_stationary
    """,
}
"""Expert → its tasks or subtasks."""

EXCLUDED = {
    "fact_checker/fever": "claims of FEVER, on which BIG-bench Lite's vitaminc_fact_verification is built",
    "cs_algorithms/valid_parentheses": "balanced brackets, as BIG-bench Hard's dyck_languages",
    "movie_dialog_same_or_different": "the question of BIG-bench Lite's play_dialog_same_or_different, on films",
    "misconceptions": "true or false statements, as BIG-bench Lite's misconceptions_russian",
    "logical_fallacy_detection": "valid or invalid arguments, as formal_fallacies_syllogisms_negation of both",
}
"""Near-duplicates of tasks in BIG-bench Hard or Lite that would otherwise be here, and what they are near to. Chosen by reading."""


def entries() -> tuple[Entry, ...]:
    """All of them."""
    found = [_entry(name, [name]) for name in SINGLE]
    found += [_entry(f"ni_{name}", [f"natural_instructions/subtask{name}"]) for name in NATURAL_INSTRUCTIONS]
    return tuple(found + [_entry(name, parts.split()) for name, parts in PARTS.items()])


def _entry(name: str, tasks: list[str]) -> Entry:
    return Entry(name, tuple(f"bigbench:{task}" for task in tasks))
