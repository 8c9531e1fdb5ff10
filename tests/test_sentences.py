from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_ds.corpus.text.sentences import split_sentences

# A bar marks where one sentence ends and the next begins; the white space around it is not part of the text's words.
EXAMPLES = [
    "It rained. | The river rose. | Nobody came!",
    "Did it rain? | Yes. | Twice!!! | Really?! | So they say.",
    "Mr. Smith met Dr. Jones and Mrs. Brown on St. James Street. | They talked.",
    "Gen. Grant wrote to Rev. Dr. King. | He did not answer.",
    "The value is 3.14 or 1,024.50 dollars. | It fell by 2.5 percent.",
    "Version 1.2.3 came out. | It was late.",
    "See Fig. 3 and No. 5 in vol. 2, pp. 10-12. | They agree.",
    "He was born on Jan. 5, 1900. | She was born on Dec. 7.",
    "Animals, e.g. Foxes, i.e. Vulpes, sleep. | Plants do not.",
    "J. R. R. Tolkien wrote it. | C. S. Lewis read it.",
    "He lives in the U.S. and works. | The U.S. Army called.",
    "He moved to the U.S. | He liked it.",
    "They met at 5 p.m. | The talk was short.",
    "It opens at 9 a.m. Monday.",
    "He works for Apple Inc. | The firm is large.",
    "Apples, pears, etc. | They are sweet.",
    "Martin Luther King Jr. Day is a holiday.",
    '"It rained." | "Did it?" she asked. | "Yes!" | He left.',
    "\u201cIt rained.\u201d | \u201cDid it?\u201d she asked. | \u2018Yes!\u2019 | He left.",
    "He left (she stayed). | (They met later.) | All was well.",
    "The war ended.[12] | Peace came.[3][4] | It lasted.",
    "Wait... | Nothing happened. | Well... nothing much.",
    "1. Introduction follows here. | 2. Methods are next.",
    "The end of 1999. | 2000 began.",
    "iPhone. iPad is next.",
    "\u00c9tienne left. | \u00c9mile stayed.",
    "我爱北京。 | 天安门很大！ | 真的吗？ | 是；| 不是。",
    "他说：“你好。” | 她说：“再见！” | 然后走了。",
    "「你好。」 | 他走了。 | （他很高兴。） | 完了",
    "真的吗？！ | 真的！！！ | 好。",
    "我喜欢《你好！李焕英》这部电影。 | 很好看。",
    "价格是3.14元。 | 下跌2.5%。",
    "好! | 我来了? | 是的",
    "He said 你好。 | Then he left. | 他走了。",
    "The answer was no. | She had seen it in Jan. | No. 5 is better.",
    "no stop at all",
    "",
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_sentences_end_where_the_example_says(example: str) -> None:
    sentences = [sentence.strip() for sentence in example.split("|") if sentence.strip()]
    is_chinese = not example.isascii() and "。" in example
    joined = example.replace(" | ", "").replace("| ", "") if is_chinese and "He" not in example else None
    for text in (" ".join(sentences), joined):
        if text is not None:
            assert split_sentences(text) == sentences


def test_chinese_sentences_need_no_space_between_them() -> None:
    assert split_sentences("我来了。你走了！好?我") == ["我来了。", "你走了！", "好?", "我"]


def test_a_line_end_always_ends_a_sentence() -> None:
    assert split_sentences("History\nIt began\r\n\n  in 1900.  \n") == ["History", "It began", "in 1900."]


@given(st.text(alphabet='aA1 .!?。！"”)《》\n', max_size=60))
def test_only_white_space_is_lost(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@given(st.text(max_size=60))
def test_sentences_are_stripped_and_not_empty(text: str) -> None:
    assert all(sentence and sentence == sentence.strip() for sentence in split_sentences(text))


def test_a_title_that_is_never_closed_holds_back_a_thousand_characters_and_no_more() -> None:
    assert [len(found) for found in split_sentences("《" + "好" * 997 + "。" + "好" * 5 + "。" + "好")] == [1005, 1]
