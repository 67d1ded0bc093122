"""The splits of the datasets that the named pools and suites read through `prompted:`, so that a recipe can be checked without the Hub.

Facts from the datasets' cards; a run asks the Hub itself.
"""

from __future__ import annotations

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS
from phatgoose.registry import unknown
from phatgoose.tasks.spec import TaskSpec

_ALL_THREE = "train validation test"
_TABLE = f"""
    adversarial_qa/adversarialQA: {_ALL_THREE}
    ag_news: train test
    amazon_polarity: train test
    anli: train_r1 dev_r1 test_r1 train_r2 dev_r2 test_r2 train_r3 dev_r3 test_r3
    app_reviews: train
    cnn_dailymail/3.0.0: {_ALL_THREE}
    common_gen: {_ALL_THREE}
    commonsense_qa: {_ALL_THREE}
    cos_e/v1.11: train validation
    cosmos_qa: {_ALL_THREE}
    dbpedia_14: train test
    dream: {_ALL_THREE}
    duorc/ParaphraseRC: {_ALL_THREE}
    gigaword: {_ALL_THREE}
    glue/mrpc: {_ALL_THREE}
    glue/qqp: {_ALL_THREE}
    hellaswag: {_ALL_THREE}
    hotpot_qa/fullwiki: {_ALL_THREE}
    imdb: train test unsupervised
    multi_news: {_ALL_THREE}
    paws/labeled_final: {_ALL_THREE}
    qasc: {_ALL_THREE}
    quail: train validation challenge
    quarel: {_ALL_THREE}
    quartz: {_ALL_THREE}
    quoref: train validation
    race/high: {_ALL_THREE}
    race/middle: {_ALL_THREE}
    ropes: {_ALL_THREE}
    rotten_tomatoes: {_ALL_THREE}
    samsum: {_ALL_THREE}
    sciq: {_ALL_THREE}
    social_i_qa: train validation
    story_cloze/2016: validation test
    super_glue/cb: {_ALL_THREE}
    super_glue/copa: {_ALL_THREE}
    super_glue/rte: {_ALL_THREE}
    super_glue/wic: {_ALL_THREE}
    super_glue/wsc.fixed: {_ALL_THREE}
    web_questions: train test
    wiki_bio: train test val
    wiki_hop/original: train validation
    wiki_qa: {_ALL_THREE}
    winogrande/winogrande_xl: {_ALL_THREE}
    wiqa: {_ALL_THREE}
    xsum: {_ALL_THREE}
    yelp_review_full: train test
"""
KNOWN = {
    name.strip(): tuple(splits.split())
    for name, _, splits in (line.partition(":") for line in _TABLE.strip().splitlines())
}
"""DATASET[/SUBSET] → its splits on the Hub."""


def check_splits(spec: TaskSpec) -> bool:
    """Whether the splits of a `prompted:` spec's dataset are known, and so those that it asks for have been checked.

    Raises:
        UnknownName: it names a split that the dataset hasn't got. TaskError: it names none, and the dataset has none to begin with.
    """
    if spec.name not in KNOWN or spec.options.keys() & {"hub", "subset", "revision"}:
        return False
    there = KNOWN[spec.name]
    asked = [spec.options[name] for name in SPLITS if name in spec.options]
    for name in asked:
        if name not in there:
            raise unknown(f"split of {spec.name}", name, there)
    if not asked and not set(there) & set(SPLITS):
        raise TaskError(f"{spec.text}: {spec.name} has the splits {', '.join(there)}; say which with test=.")
    return True
