"""Suites under names: the tasks that a pool is measured on, in the variants of the PHATGOOSE paper.

    t0ho           T0's eleven held-out datasets under all of promptsource's prompts for the original task
    bbh            BIG-bench Hard: 20 tasks of BIG-bench with its choices, 3 of the chain-of-thought repository's rows
    bbl            BIG-bench Lite: 24 tasks of BIG-bench; conlang_translation by ROUGE-L, as in the paper
    bbh-cot-repo   BIG-bench Hard as its authors published it: 27 files
    quickstart     the quickstart's five unseen tasks

The authors ran 22 tasks of `bbh` and 17 of `bbl`: T5's tokenizer can't write the others. That is found for any tokenizer by
`representable.loss`, which leaves a T5 those 22, and those 17 with code_line_description. BIG-bench rows are formatted by `bigbench:`, not by the Hub copy that the authors read.
"""

from __future__ import annotations

from dataclasses import dataclass

from phatgoose.registry import lookup
from phatgoose.tasks.lists.entries import Entry
from phatgoose.tasks.lists.same_dataset import NATURAL_INSTRUCTIONS
from phatgoose.tasks.sources.bbh import NAMES

SUITES = {
    "t0ho": "phatgoose.tasks.lists.suites:t0ho",
    "bbh": "phatgoose.tasks.lists.suites:bbh",
    "bbl": "phatgoose.tasks.lists.suites:bbl",
    "bbh-cot-repo": "phatgoose.tasks.lists.suites:bbh_cot_repo",
    "quickstart": "phatgoose.tasks.lists.suites:quickstart",
}
BBH_BIGBENCH = [
    "causal_judgment",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies_syllogisms_negation",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction",
    "movie_recommendation",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects",
    "word_sorting",
]
BBH_ROWS = {
    "boolean_expressions": "?choices=True|False",
    "multistep_arithmetic_two": "",
    "web_of_lies": "?choices=Yes|No",
}
BBL = [
    "auto_debugging",
    "bbq_lite_json",
    "code_line_description",
    "conceptual_combinations",
    "conlang_translation",
    "emoji_movie",
    "formal_fallacies_syllogisms_negation",
    "hindu_knowledge",
    "known_unknowns",
    "language_identification",
    "linguistics_puzzles",
    "logic_grid_puzzle",
    "logical_deduction",
    "misconceptions_russian",
    "novel_concepts",
    "operators",
    "parsinlu_reading_comprehension",
    "play_dialog_same_or_different",
    "repeat_copy_logic",
    "strange_stories",
    "strategyqa",
    "symbol_interpretation",
    "vitaminc_fact_verification",
    "winowhy",
]
# The four that ask for C1 or C2 aren't among the eight that the paper used.
_COPA_LEFT_OUT = (
    "…which may be caused by|…What could happen next, C1 or C2?|…As a result, C1 or C2?|…why? C1 or C2"
)
T0HO = {
    "rte": "super_glue/rte?test=validation&files=rte",
    "cb": "super_glue/cb?test=validation&files=cb",
    "anli_r1": "anli?train=train_r1&test=dev_r1&files=anli_r1",
    "anli_r2": "anli?train=train_r2&test=dev_r2&files=anli_r2",
    "anli_r3": "anli?train=train_r3&test=dev_r3&files=anli_r3",
    "copa": f"super_glue/copa?test=validation&files=copa&without={_COPA_LEFT_OUT}",
    "hellaswag": "hellaswag?test=validation&files=hellaswag",
    "story_cloze": "story_cloze/2016?test=test&files=story_cloze",
    "wic": "super_glue/wic?test=validation&files=wic",
    "winogrande": "winogrande/winogrande_xl?test=validation&files=winogrande_xl",
    "wsc": "super_glue/wsc.fixed?test=validation&files=wsc_eep",
}
_WINOGRANDE_PARTS = (
    "subtask029_winogrande_full_object",
    "subtask030_winogrande_full_person",
    "subtask031_winogrande_question_generation_object",
    "subtask032_winogrande_question_generation_person",
    "subtask033_winogrande_answer_generation",
    "subtask034_winogrande_question_modification_object",
    "subtask035_winogrande_question_modification_person",
)
_T0HO_BY_OTHER_NAMES = frozenset(
    {
        "glue/rte",
        "super_glue/wsc",
        "glue/wnli",
        "winograd_wsc",
        "definite_pronoun_resolution",
        "winogrande",
        "story_cloze",
        "flan",
        "bigbench/winowhy",
        *(f"bigbench/natural_instructions/{part}" for part in _WINOGRANDE_PARTS),
    }
)
"""Their rows, or what they are made of, as other collections have it: GLUE's RTE, Winograd's schemas, all sizes of WinoGrande, FLAN as a
whole."""
_BBL_BY_OTHER_NAMES = frozenset({"strategyqa", "strategy_qa", "vitaminc", "vitamin_c"})
"""Datasets that its tasks are made of."""


@dataclass(frozen=True)
class Suite:
    """Tasks measured together; a model's score on it is their unweighted mean."""

    name: str
    entries: tuple[Entry, ...]
    refuses: frozenset[str] = frozenset()
    """Datasets beyond its own that no expert may hold."""
    own_copy: tuple[str, ...] = ()
    """Entries whose data can't be fetched: without the user's own copy in a folder they are left out, which is said."""


def suite(name: str) -> Suite:
    """A named suite.

    Raises:
        UnknownName: there is no suite of this name.
    """
    return lookup("suite", name, SUITES)()


def t0ho() -> Suite:
    entries = [Entry(name, (f"prompted:{rest}&templates=original",)) for name, rest in T0HO.items()]
    return Suite("t0ho", tuple(entries), _T0HO_BY_OTHER_NAMES | {NATURAL_INSTRUCTIONS}, ("story_cloze",))


def bbh() -> Suite:
    rows = [_bigbench(name) for name in BBH_BIGBENCH]
    return Suite("bbh", (*rows, *(Entry(n, (f"bbh:{n}{choices}",)) for n, choices in BBH_ROWS.items())))


def bbl() -> Suite:
    return Suite("bbl", tuple(_bigbench(name) for name in BBL), _BBL_BY_OTHER_NAMES)


def bbh_cot_repo() -> Suite:
    return Suite("bbh-cot-repo", tuple(Entry(n, (f"bbh:{n}",)) for n in NAMES))


def quickstart() -> Suite:
    names = ("sports_understanding", "hyperbaton", "hindu_knowledge", "implicatures", "metaphor_boolean")
    return Suite("quickstart", tuple(_bigbench(name) for name in names))


def _bigbench(name: str) -> Entry:
    metric = "rougeL" if name == "conlang_translation" else None
    # Its rows have choices, and BIG-bench prefers to match them; the paper's variant ranks whatever has choices.
    ranked = "?ranked=true" if name == "penguins_in_a_table" else ""
    return Entry(name, (f"bigbench:{name}{ranked}",), metric)
