"""The 166 experts of the paper's FLAN pool, as in the authors' released configuration: the T0 Held-In 36, seven more under
promptsource's prompts, 48 tasks of Flan2021 and Dialog, and 75 categories of Natural Instructions v2; zero-shot prompts only.

Natural Instructions' categories hold tasks built on many datasets, T0's held-out ones among them, and aren't searched one by one:
they all count as the dataset "natural-instructions", which `t0ho` refuses.
"""

from __future__ import annotations

from phatgoose.tasks.lists import pools_t0
from phatgoose.tasks.lists.entries import Entry

MORE_PROMPTED = {
    "wsc": "super_glue/wsc.fixed", "copa": "super_glue/copa", "hellaswag": "hellaswag", "wic": "super_glue/wic",
    "race_high": "race/high", "race_middle": "race/middle", "web_questions": "web_questions",
}  # fmt: skip
FLAN2021 = [
    "ai2_arc/ARC-Easy:1.0.0",
    "ai2_arc/ARC-Challenge:1.0.0",
    "algebra__linear_1d:1.0.0",
    "bool_q:1.0.0",
    "coqa:1.0.0",
    "definite_pronoun_resolution:1.1.0",
    "drop:2.0.0",
    "fix_punct",
    "gem/dart:1.1.0",
    "gem/e2e_nlg:1.1.0",
    "gem/web_nlg_en:1.1.0",
    "gem/wiki_lingua_english_en:1.1.0",
    "glue/sst2:2.0.0",
    "glue/cola:2.0.0",
    "glue/mnli:2.0.0",
    "glue/qnli:2.0.0",
    "glue/stsb:2.0.0",
    "glue/wnli:2.0.0",
    "lambada:1.0.0",
    "natural_questions_open:1.0.0",
    "newsroom:1.0.0",
    "openbookqa:0.1.0",
    "opinion_abstracts_idebate",
    "opinion_abstracts_rotten_tomatoes",
    "para_crawl_enes",
    "piqa:1.0.0",
    "quac:1.0.0",
    "sentiment140:1.0.0",
    "snli:1.1.0",
    "squad/v2.0:3.0.0",
    "super_glue/multirc:1.0.2",
    "super_glue/record:1.0.2",
    "trivia_qa/rc:1.1.0",
    "true_case",
    "unified_qa_science_inst",
    "word_segment",
    "aeslc:1.0.0",
    "wmt16_translate/cs-en:1.0.0",
    "wmt16_translate/de-en:1.0.0",
    "wmt16_translate/ru-en:1.0.0",
    "wmt16_translate/fi-en:1.0.0",
    "wmt16_translate/ro-en:1.0.0",
    "wmt16_translate/tr-en:1.0.0",
    "wmt14_translate/fr-en:1.0.0",
]
DIALOG = ("qrecc", "wiki_dialog", "qrecc_ii", "wiki_dialog_ii")
NIV2 = """
    Translation, Program Execution, Question Generation, Sentiment Analysis, Text Categorization, Text Matching,
    Toxic Language Detection, Cause Effect Classification, Information Extraction, Textual Entailment,
    Wrong Candidate Generation, Named Entity Recognition, Commonsense Classification, Fill in The Blank, Text Completion,
    Sentence Composition, Title Generation, Language Identification, Question Understanding, Sentence Perturbation,
    Answerability Classification, Summarization, Coreference Resolution, Text Quality Evaluation, Text to Code, Paraphrasing,
    Dialogue Generation, Question Rewriting, Word Semantics, Pos Tagging, Linguistic Probing, Story Composition,
    Speaker Identification, Word Analogy, Data to Text, Stereotype Detection, Negotiation Strategy Detection,
    Dialogue Act Recognition, Gender Classification, Coherence Classification, Explanation, Ethics Classification,
    Word Relation Classification, Sentence Ordering, Answer Verification, Mathematics, Intent Identification, Keyword Tagging,
    Code to Text, Dialogue State Tracking, Text Simplification, Stance Detection, Fact Verification, Grammar Error Detection,
    Section Classification, Number Conversion, Style Transfer, Speaker Relation Classification, Irony Detection,
    Question Decomposition, Overlap Extraction, Grammar Error Correction, Spelling Error Detection, Entity Generation,
    Sentence Expansion, Discourse Connective Identification, Discourse Relation Classification, Poem Generation,
    Entity Relation Classification, Punctuation Error Detection, Spam Classification, Paper Review, Sentence Compression,
    Preposition Prediction, Misc.
"""


def entries() -> tuple[Entry, ...]:
    """All 166."""
    prompted = [_prompted(name, dataset) for name, dataset in MORE_PROMPTED.items()]
    flan = [_flan("flan2021", task) for task in FLAN2021]
    dialog = [_flan("dialog", task) for task in DIALOG]
    niv2 = [_flan("niv2", " ".join(name.split())) for name in NIV2.split(",")]
    return (*pools_t0.entries(), *prompted, *flan, *dialog, *niv2)


def _prompted(name: str, dataset: str) -> Entry:
    test = "test" if dataset == "web_questions" else "validation"
    return Entry(name, (f"prompted:{dataset}?test={test}",))


def _flan(collection: str, task: str) -> Entry:
    name = (
        f"{collection}_{task.partition(':')[0]}".replace("/", "_").replace(" ", "_").removesuffix(".").lower()
    )
    return Entry(name, (f"flan:{collection}/{task}",))
