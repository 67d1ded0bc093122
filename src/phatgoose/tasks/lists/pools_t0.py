"""The 36 experts of the paper's T0 Held-In pool: datasets, prompts and splits as in the authors' released configuration.

Each expert learns a dataset under promptsource's prompts. `test=` is the split the authors measured on; validation is taken from
train. Kept apart from theirs: TREC has a prompt of ours, as theirs isn't promptsource's, and Hub ids may have moved since.
"""

from __future__ import annotations

from phatgoose.tasks.lists.entries import Entry

TREC = (
    "hf:trec?input=Question: {text}%0AWhich kind of answer does this question ask for?%0AAnswer:"
    "&target=fine_label&choices=names"
)
_GIN = """
    social_i_qa test=validation
    paws/labeled_final test=validation&without=paraphrase-task
    wiki_qa test=validation&without=Direct Answer to Question|Generate Question from Topic|Jeopardy style|Topic Prediction - Answer Only|Topic Prediction - Question Only|Topic Prediction - Question and Answer Pair
    ropes test=validation
    ag_news test=test
    amazon_polarity test=test
    wiki_bio test=val
    cnn_dailymail/3.0.0 test=validation
    cosmos_qa test=validation
    quail test=validation
    quartz test=validation
    qasc test=validation
    common_gen test=validation
    adversarial_qa/adversarialQA test=validation
    app_reviews
    commonsense_qa test=validation
    cos_e/v1.11 test=validation
    dbpedia_14 test=test
    dream test=validation
    duorc/ParaphraseRC test=validation
    gigaword test=validation
    hotpot_qa/fullwiki test=validation
    imdb test=test
    glue/mrpc test=validation
    multi_news test=validation
    glue/qqp test=validation
    quarel test=validation
    quoref test=validation
    rotten_tomatoes test=validation
    samsum test=validation
    sciq test=validation
    wiki_hop/original test=validation
    wiqa test=validation
    xsum test=validation
    yelp_review_full test=test
"""
NAMES = {
    "paws/labeled_final": "paws", "cnn_dailymail/3.0.0": "cnn_dailymail", "adversarial_qa/adversarialQA": "adversarial_qa",
    "cos_e/v1.11": "cos_e", "duorc/ParaphraseRC": "duorc", "hotpot_qa/fullwiki": "hotpot_qa", "glue/mrpc": "mrpc",
    "glue/qqp": "qqp", "wiki_hop/original": "wiki_hop",
}  # fmt: skip
# A local copy as T0's own rows have it lies under P3's names.
_FILES = {
    "adversarial_qa/adversarialQA": "adversarial_qa_dbert", "hotpot_qa/fullwiki": "kilt_tasks_hotpotqa",
    "cnn_dailymail/3.0.0": "cnn_dailymail_3_0_0", "cos_e/v1.11": "cos_e_v1.11",
}  # fmt: skip


def entries() -> tuple[Entry, ...]:
    """All 36, in the authors' order of listing, TREC last."""
    found = [_entry(*line.strip().partition(" ")[::2]) for line in _GIN.strip().splitlines()]
    return (*found, Entry("trec", (TREC,), note="a prompt of ours"))


def _entry(dataset: str, options: str) -> Entry:
    parts = [o for o in (options, f"files={_FILES[dataset]}" if dataset in _FILES else "") if o]
    spec = f"prompted:{dataset}" + (f"?{'&'.join(parts)}" if parts else "")
    return Entry(NAMES.get(dataset, dataset), (spec,))
