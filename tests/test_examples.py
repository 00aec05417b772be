import itertools
import json
import math
import random
import re
from collections import Counter

import pytest
import torch
from test_data import texts

import data

# ---- chat


class Foreign:
    """A tokenizer of another family: these marks, and single bytes as pieces."""

    def __init__(self, *marks, bos=None, eos=None):
        self.bytes = [bytes([i]) for i in range(256)] + [b""] * len(marks)
        self.marks = {mark: 256 + i for i, mark in enumerate(marks)}
        self.bos_id, self.eos_id, self.sha256 = self.marks.get(bos), self.marks.get(eos), "foreign"
        self.vocab_size, self.special_id, self.pad_id = len(self.bytes), self.marks.get, None

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode()


USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "b"}
LLAMA3 = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
FORMATS = {
    "ours": (None, "<s><|system|>S<|user|>U<|assistant|>[A</s>]<|user|>V<|assistant|>[B</s>]<|assistant|>"),
    "chatml": (Foreign("<|im_start|>", "<|im_end|>"),
               "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"
               "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n[B<|im_end|>]\n<|im_start|>assistant\n"),
    "llama3": (Foreign(*LLAMA3, bos=LLAMA3[0]), LLAMA3[0] + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}" for role, text in (
            ("system", "S<|eot_id|>"), ("user", "U<|eot_id|>"), ("assistant", "[A<|eot_id|>]"),
            ("user", "V<|eot_id|>"), ("assistant", "[B<|eot_id|>]"), ("assistant", "")))),
    "plain": (Foreign("<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>"),
              "<|endoftext|>### system:\nS\n\n### user:\nU\n\n### assistant:\n[A<|endoftext|>]\n\n"
              "### user:\nV\n\n### assistant:\n[B<|endoftext|>]\n\n### assistant:\n")}
TALK = [{"role": role, "content": text} for role, text in (
    ("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))]


def spell(tokenizer, ids):
    """Ids as text, marks included."""
    marks = getattr(tokenizer, "marks", None) or {tokenizer.piece(i): i for i in range(7)}
    names = {i: mark for mark, i in marks.items()}
    return "".join(names[i] if i in names else tokenizer.decode([i]) for i in ids)


@pytest.mark.parametrize("name", data.CHAT_FORMATS)
def test_every_chat_format_has_its_marks_and_its_answers(tokenizer, name):
    t, expected = FORMATS[name]
    t = t or tokenizer
    ids, is_answer = data.encode_chat(t, TALK, reply=True)
    assert data.chat_format(t) == data.CHAT_FORMATS[name]
    assert spell(t, ids) == expected.replace("[", "").replace("]", "") and len(ids) == len(is_answer)
    answers = [spell(t, [i for i, _ in group]) for answer, group in
               itertools.groupby(zip(ids, is_answer, strict=True), lambda pair: pair[1]) if answer]
    assert answers == re.findall(r"\[(.*?)\]", expected)
    assert {spell(t, [data.end_of_turn(t)])} == {answer[1:] for answer in answers}
    jinja2 = pytest.importorskip("jinja2", reason="optional: pip install jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(data.chat_template(t))
    bos, eos = {"ours": ("<s>", "</s>"), "chatml": ("", ""), "llama3": (LLAMA3[0], ""),
                "plain": ("<|endoftext|>", "<|endoftext|>")}[name]
    for reply in (True, False):
        text = template.render(messages=TALK, add_generation_prompt=reply, bos_token=bos, eos_token=eos)
        assert text == spell(t, data.encode_chat(t, TALK, reply=reply)[0])


def test_text_never_becomes_a_mark(tokenizer):
    marks = [tokenizer.special_id(f"<|{role}|>") for role in data.ROLES]
    assert marks == [4, 5, 6] and tokenizer.special_id("</s>") == tokenizer.eos_id
    assert [tokenizer.special_id(text) for text in ("<|im_start|>", "def", "<0x41>", "<unk>", "")] == [None] * 5
    told = data.Tokenizer.train(["<|user|> and <|assistant|> are marks </s>\n" * 50], 400)   # though it read them
    for t, text in itertools.product((tokenizer, told), ("<|user|>", "a<|assistant|></s>", "<|system|><|user|>x")):
        ids = t.encode(text)
        assert t.decode(ids) == text and min(ids) > 6
        chat, is_answer = data.encode_chat(t, [USER | {"content": text}, BOT | {"content": text}])
        assert chat == [t.bos_id, 5, *ids, 6, *ids, t.eos_id]
        assert is_answer == [False] * (len(ids) + 3) + [True] * (len(ids) + 1)


def test_a_tokenizer_without_any_end_is_refused():
    with pytest.raises(data.DataError, match="must have an end-of-text token"):
        data.encode_chat(Foreign("<|start|>"), TALK)


# ---- instructions


PROGRAM = '''
import os
def plain(x):
    """Twice x."""
    return 2 * x  # a comment
class A:
    class B:
        @property
        async def method(self):
            """First.

                Indented \\\\d.
            Last.
            """
            def inner():
                """Not taken."""
                return 1
            return inner
    def silent(self): return 1
    def only(self):
        """Nothing but this."""
def long():
    """Long."""
    return "%s"
''' % ("x" * 300)


def test_instructions_come_from_functions_and_keep_their_documents_side(tmp_path, recwarn):
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.py").write_text(PROGRAM)
    (source / "broken.py").write_text("def f(:\n")
    (source / "nul.py").write_text("x = '\0'\n")
    (source / "bytes.py").write_bytes(b"\xff")
    (source / "warns.py").write_text("def w():\n    '''Warns.'''\n    return '\\d' is 1\n")
    for i in range(40):
        (source / f"{i}.py").write_text(f"def f{i}():\n    '''The number {i}.'''\n    return {i}\n"
                                        f"def same():\n    '''Same in all.'''\n    return {i % 13}\n")
    counts = data.instructions([source], tmp_path / "made" / "chat.jsonl", val_fraction=0.3, max_chars=300)
    rows = [json.loads(line) for line in (tmp_path / "made" / "chat.jsonl").read_text().splitlines()]
    pairs = {(row["messages"][0]["content"], row["messages"][1]["content"]): row["split"] for row in rows}
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    ask_doc, ask_function = "Write the docstring of this function.\n\n", "Write a function with this docstring.\n\n"
    method = ("@property\nasync def method(self):\n\n    def inner():\n        \"\"\"Not taken.\"\"\"\n"
              "        return 1\n    return inner")
    for function, doc in (("def plain(x):\n    return 2 * x", "Twice x."),
                          (method, "First.\n\n    Indented \\d.\nLast.")):
        assert (ask_doc + function, f'"""{doc}"""') in pairs and (ask_function + doc, function) in pairs
    assert not [p for pair in pairs for p in pair if p.startswith(("def inner", '"""Nothing', '"""Long', "def silent"))]
    assert len(pairs) == len(rows) and counts["dropped"] == {
        "invalid UTF-8": 1, "not Python": 2, "too long": 2, "duplicate row": counts["dropped"]["duplicate row"],
        "prompt is held out": counts["dropped"]["prompt is held out"]}
    # as prepare: the numbers of the rows on either side are those of the documents on either side
    out = data.prepare([source], tmp_path / "out", 320, val_fraction=0.3)
    for split in ("train", "val"):
        base = {int(n) for text in texts(out, split) for n in re.findall(r"The number (\d+)", text)}
        ours = {int(n) for (p, _), side in pairs.items() if side == split for n in re.findall(r"The number (\d+)", p)}
        assert base == ours and base
    # a prompt that a held-out document has is asked of no train row
    assert {side for (p, _), side in pairs.items() if "Same in all" in p} == {"val"}
    assert sum(counts["dropped"].values()) - 5 + len(rows) == 4 * 40 + 4 + 2
    prompts = [json.loads(line) for line in (tmp_path / "made" / "prompts.jsonl").read_text().splitlines()]
    expected = {p: side for (p, _), side in pairs.items() if p.startswith(ask_function)}
    assert {row["prompt"]: row["split"] for row in prompts} == expected and len(prompts) == len(expected)
    assert counts == {**Counter(pairs.values()), "prompts": len(prompts), "dropped": counts["dropped"]}
    # the rewards give what we wrote full marks
    for row in rows:
        answer = row["messages"][1]["content"]
        assert data.follows_format(row, answer) == 1.0
        assert data.parses(row, answer) == float(not answer.startswith('"""'))
    assert not recwarn.list


def test_instructions_on_the_command_line(tmp_path, capsys):
    (tmp_path / "a.py").write_text(PROGRAM)
    out = tmp_path / "chat.jsonl"
    assert data.main(["instructions", str(tmp_path / "a.py"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out and len(out.read_text().splitlines()) == 6
    (tmp_path / "b.py").write_text("x = 1\n")
    for wrong, message in (([str(tmp_path / "b.py"), "--out", str(out)], "must hold functions with docstrings"),
                           ([str(tmp_path / "a.py"), "--out", str(tmp_path / "prompts.jsonl")], "another name"),
                           ([str(tmp_path / "a.py"), "--out", str(out), "--val-fraction", "1"], "val_fraction must")):
        assert data.main(["instructions", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# ---- examples


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat_rows(n=120, **extra):
    """Conversations of several lengths; two turns in every third."""
    rng, rows = random.Random(3), []
    for i in range(n):
        words = ["".join(rng.choices("abcdefgh ", k=rng.randrange(1, 30))) + str(i) for _ in range(4)]
        messages = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]
        if i % 3 == 0:
            messages = [{"role": "system", "content": "be brief"}, *messages, {"role": "user", "content": words[2]},
                        {"role": "assistant", "content": words[3]}]
        rows.append({"messages": messages} | extra)
    return rows


def pair_rows(n=120):
    return [{"prompt": row["messages"][:-1] if i % 2 else row["messages"][-2]["content"],
             "chosen": f"yes {i} " * (i % 5 + 1), "rejected": "no" + "!" * (i % 7)}
            for i, row in enumerate(chat_rows(n))]


def examples(path, tokenizer, objective="sft", **kwargs):
    layout = {"micro_batch_size": 4, "seq_len": 96, "seed": 5} | kwargs
    return data.Examples(path, tokenizer, objective=objective, **layout)


def answers_of(tokenizer, batch, row):
    """Every run of targets of a row: (document, ids)."""
    targets, documents = batch["targets"][row].tolist(), batch["documents"][row].tolist()
    runs = itertools.groupby(zip(targets, documents, strict=True), lambda pair: (pair[0] >= 0, pair[1]))
    return [(document, [i for i, _ in run]) for (is_target, document), run in runs if is_target]


@pytest.mark.parametrize("marks", ["ours", "chatml", "plain"])
def test_the_targets_of_an_epoch_are_exactly_the_answers(tokenizer, tmp_path, marks):
    t, rows = FORMATS[marks][0] or tokenizer, chat_rows()
    pad_id = tokenizer.pad_id if t is tokenizer else data.end_of_turn(t)
    inputs_of_rows = {tuple(data.encode_chat(t, row["messages"])[0][:-1]) for row in rows}
    one = examples(write_rows(tmp_path / "a.jsonl", rows), t, seq_len=300)
    val = examples(tmp_path / "a.jsonl", t, seq_len=300, split="val")
    found = []
    for side in (one, val):
        for epoch in range(2 if side is one else 1):
            batch = side.batch(range(epoch * side.num_windows, (epoch + 1) * side.num_windows))
            assert batch["tokens"].shape == (side.num_windows, 300) and batch["tokens"].dtype == torch.int64
            assert batch["count"].shape == () and batch["count"] == (batch["targets"] != data.NO_TARGET).sum()
            answers = [ids for row in range(side.num_windows) for _, ids in answers_of(t, batch, row)]
            found += answers if epoch == 0 else []
            assert sorted(answers) == sorted(found[-len(answers):])
        documents, tokens, targets = batch["documents"], batch["tokens"], batch["targets"]
        assert documents.min() == 1 and documents.max() <= side.num_documents and (documents.diff() >= 0).all()
        # inside a document a target is the next token; the padding is a document of its own, without targets
        same = (documents.diff() == 0) & (targets[:, :-1] != data.NO_TARGET)
        assert torch.equal(targets[:, :-1][same], tokens[:, 1:][same]) and same.sum() > 10
        conversations = 0
        for row in range(side.num_windows):
            for number in range(1, int(documents[row].max()) + 1):
                inputs = tokens[row][documents[row] == number].tolist()
                if tuple(inputs) in inputs_of_rows:
                    conversations += 1
                else:
                    assert number == documents[row].max() and set(inputs) == {pad_id}
                    assert (targets[row][documents[row] == number] == data.NO_TARGET).all()
        assert conversations == len(side.examples)
    expected = [t.encode(m["content"]) + [data.end_of_turn(t)] for r in rows for m in r["messages"]
                if m["role"] == "assistant"]
    assert sorted(found) == sorted(expected)
    assert one.manifest["dropped"] == val.manifest["dropped"] == {} and val.examples
    lengths = [len(data.encode_chat(t, row["messages"])[0]) for row in rows]
    assert sum(side.manifest["splits"][side.split]["tokens"] for side in (one, val)) == sum(lengths)


def test_preference_windows_hold_the_same_prompts_document_by_document(tokenizer, tmp_path):
    rows = pair_rows()
    one = examples(write_rows(tmp_path / "p.jsonl", rows), tokenizer, "dpo", seq_len=200)
    batch = one.batch(range(one.num_windows))
    window = batch["window"].tolist()
    assert sorted(window) == list(range(one.num_windows)) and window != sorted(window)
    assert all(b == a + 1 and a % 2 == 0 for a, b in zip(window[::2], window[1::2], strict=True))
    found, sizes = [], []
    for row in range(0, one.num_windows, 2):
        chosen, rejected = (answers_of(tokenizer, batch, r) for r in (row, row + 1))
        assert [d for d, _ in chosen] == [d for d, _ in rejected] == list(range(1, len(chosen) + 1))
        sizes.append(len(chosen))
        for document in range(1, len(chosen) + 1):
            sides = []
            for r in (row, row + 1):
                inside = batch["documents"][r] == document
                first = (batch["targets"][r][inside] != data.NO_TARGET).nonzero()[0]
                sides.append(batch["tokens"][r][inside].tolist()[:first + 1])                  # up to the answer
            assert sides[0] == sides[1]
            found.append((sides[0], chosen[document - 1][1], rejected[document - 1][1]))
    assert batch["count"] == len(found) == len(one.examples)
    assert one.num_documents == max(sizes) + 1
    assert max(sizes) > 1 and batch["documents"].max() <= one.num_documents
    expected = []
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        expected.append((data.encode_chat(tokenizer, prompt, reply=True)[0],
                         *(tokenizer.encode(row[k]) + [tokenizer.eos_id] for k in ("chosen", "rejected"))))
    val = examples(tmp_path / "p.jsonl", tokenizer, "dpo", seq_len=200, split="val")
    assert len(found) + len(val.examples) == len(rows)
    assert all(triple in expected for triple in found) and len(set(map(str, found))) == len(found)
    assert int(next(one)["count"]) == sum(sizes[:2])


def test_prompts_are_ready_for_an_answer(tokenizer, tmp_path):
    rows = [{"prompt": "one", "level": 3}, {"prompt": TALK[:2]}, {"messages": TALK}, {"prompt": "two", "answer": "x"}]
    one = examples(write_rows(tmp_path / "r.jsonl", [row | {"split": "train"} for row in rows]), tokenizer, "rl")
    assert one.num_windows == 4
    prompts = [[{"role": "user", "content": "one"}], TALK[:2], TALK[:4], [{"role": "user", "content": "two"}]]
    got = {json.dumps(row): ids for ids, row in one.batch(range(4))}
    assert got == {json.dumps(row | {"split": "train"}): data.encode_chat(tokenizer, prompt, reply=True)[0]
                   for row, prompt in zip(rows, prompts, strict=True)}
    assert all(type(i) is int for ids in got.values() for i in ids)


@pytest.mark.parametrize("objective", ["sft", "dpo", "rl"])
def test_the_global_batch_of_examples_does_not_depend_on_the_layout(tokenizer, tmp_path, objective):
    path = write_rows(tmp_path / "a.jsonl", pair_rows(70) if objective == "dpo" else chat_rows(70))
    reference = examples(path, tokenizer, objective, micro_batch_size=8)
    expected = [next(reference) for _ in range(2 * reference.num_windows // 8)]                  # into the second epoch
    assert 16 < reference.num_windows and reference.num_windows % 8
    for dp, micro in ((1, 4), (2, 2), (4, 2), (2, 4)):
        ranks = [examples(path, tokenizer, objective, micro_batch_size=micro, dp_rank=r, dp_size=dp) for r in range(dp)]
        for batch in expected:
            got = [next(r) for _ in range(8 // (micro * dp)) for r in ranks]
            if objective == "rl":
                assert sum(got, []) == batch
                continue
            assert sum(int(g["count"]) for g in got) == batch["count"]
            assert all(torch.equal(torch.cat([g[key] for g in got]), batch[key]) for key in batch if key != "count")
    other, state = next(examples(path, tokenizer, objective, micro_batch_size=8, seed=6)), reference.state_dict()
    assert str(other) != str(expected[0])
    again = examples(path, tokenizer, objective, micro_batch_size=8)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert str(next(again)) == str(next(reference))
    path.write_text(path.read_text() + "\n")
    for change in (dict(seq_len=97), {}):
        with pytest.raises(data.DataError, match="must be as when the state was saved"):
            examples(path, tokenizer, objective, **change).load_state_dict(state)


GOOD = {"prompt": "p", "answer": "a", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("objective, row, message", [
    ("sft", "{broken", "a row must be JSON, got b'{broken"), ("sft", b"\xff", "a row must be JSON"),
    ("sft", "[" * 100000, "a row must be JSON"), ("rl", [1], r"a row must be a JSON object, got \[1\]"),
    ("sft", {"prompt": "p"}, r"a row of sft must have messages, or prompt, answer, got \['prompt'\]"),
    ("rl", {"text": "p"}, r"a row of rl must have messages, or prompt, got \['text'\]"),
    ("dpo", {"messages": [USER, BOT]}, "a row of dpo must have prompt, chosen, rejected, got"),
    ("dpo", {"prompt": "p", "chosen": "a"}, "a row of dpo must have prompt, chosen, rejected, got"),
    ("dpo", GOOD | {"rejected": "a"}, r"chosen and rejected must differ, got \['a', 'a'\]"),
    ("dpo", GOOD | {"rejected": " "}, "an answer must not be empty, got ' '"),
    ("dpo", GOOD | {"chosen": None}, "content must be a string, got None"),
    ("sft", GOOD | {"answer": ""}, "an answer must not be empty, got ''"),
    ("sft", GOOD | {"answer": ["a"]}, "content must be a string, got"),
    ("rl", GOOD | {"prompt": 7}, "prompt must be a string or a list of messages, got 7"),
    ("dpo", GOOD | {"prompt": []}, r"prompt must be a string or a list of messages, got \[\]"),
    ("sft", GOOD | {"split": "test"}, "split must be \"train\" or \"val\", got 'test'"),
    ("sft", {"messages": []}, r"messages must be a list of messages, got \[\]"),
    ("sft", {"messages": "text"}, "messages must be a list of messages, got 'text'"),
    ("sft", {"messages": ["u", BOT]}, "a message must have role, content, got 'u'"),
    ("sft", {"messages": [{"role": "user"}, BOT]}, "a message must have role, content, got {'role': 'user'}"),
    ("sft", {"messages": [USER | {"role": "tool"}, BOT]}, "role must be one of system, user, assistant, got 'tool'"),
    ("sft", {"messages": [USER | {"role": ["user"]}, BOT]}, "role must be one of"),
    ("sft", {"messages": [USER | {"content": 3}, BOT]}, "content must be a string, got 3"),
    ("sft", {"messages": [USER, BOT | {"content": ""}, USER, BOT]}, "an answer must not be empty"),
    ("sft", {"messages": [USER, BOT, USER]}, r"the last message must be the assistant's, got \[{'role': 'user'"),
    ("rl", {"messages": [USER]}, "the last message must be the assistant's"),
    ("rl", {"prompt": [USER, BOT]}, "a prompt must not end with the assistant's message")])
def test_a_bad_row_is_one_line_with_its_number(tokenizer, tmp_path, objective, row, message):
    path, good = tmp_path / "bad.jsonl", json.dumps(GOOD).encode()
    row = row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
    path.write_bytes(good + b"\r\n\n  \n" + row + b"\n" + good)
    for split in ("train", "val"):
        with pytest.raises(data.DataError, match=r"bad\.jsonl:4: " + message) as error:
            examples(path, tokenizer, objective, split=split)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_conversation_may_begin_with_its_answer(tokenizer, tmp_path):
    """Nobody asked: the opening of the answer is the whole prompt."""
    assert data.conversation({"messages": [BOT]}, "sft") == ([], ["b"])
    batch = next(examples(write_rows(tmp_path / "a.jsonl", [{"messages": [BOT], "split": "train"}]), tokenizer))
    assert ((batch["targets"] >= 0).sum(1) == len(tokenizer.encode("b")) + 1).all()


def test_what_is_too_long_is_cut_or_dropped_and_counted(tokenizer, tmp_path):
    long, opening = "x" * 200, len(data.encode_chat(tokenizer, [USER], reply=True)[0])
    cost = len(tokenizer.encode(long))
    rows = [{"messages": [USER, BOT | {"content": long}]}, {"messages": [USER | {"content": long}, BOT]},
            {"messages": [USER, BOT]}, {"messages": [USER, BOT, USER | {"content": long}, BOT]}]
    path = write_rows(tmp_path / "a.jsonl", [row | {"split": "train"} for row in rows])
    one = examples(path, tokenizer, seq_len=20)
    assert cost > 30 and one.manifest["dropped"] == {"tail cut": 2, "answer cut to nothing": 1}
    batch = one.batch(range(one.num_windows))
    found = sorted(ids for row in range(one.num_windows) for _, ids in answers_of(tokenizer, batch, row))
    b = tokenizer.encode("b") + [tokenizer.eos_id]
    assert found == sorted([b, b, tokenizer.encode(long)[:21 - opening]])
    pairs = [{"prompt": "u", "chosen": long, "rejected": "no"}, {"prompt": long, "chosen": "a", "rejected": "b"}]
    write_rows(path, [row | {"split": "val"} for row in pairs])
    one = examples(path, tokenizer, "dpo", seq_len=20, split="val")
    assert one.manifest["dropped"] == {"tail cut": 1, "answer cut to nothing": 1} and one.num_windows == 2
    with pytest.raises(data.DataError, match="a.jsonl: must hold rows of the train split for dpo.*1 rows in all"):
        examples(path, tokenizer, "dpo", seq_len=20)
    # a quarter of seq_len is left for the answer, or the prompt is dropped
    write_rows(path, [{"prompt": "u"}] * 2)
    assert examples(path, tokenizer, "rl", seq_len=math.ceil(opening / 0.75)).manifest["dropped"] == {}
    with pytest.raises(data.DataError, match="dropped: {'prompt leaves less than seq_len / 4': 2}"):
        examples(path, tokenizer, "rl", seq_len=math.ceil(opening / 0.75) - 1)


def test_sides_of_rows(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", chat_rows(200))

    def prompts(split, source=path):
        one = examples(source, tokenizer, "rl", split=split, seq_len=300)
        return {row["messages"][-2]["content"] for _, row in one.batch(range(one.num_windows))}

    train, val = prompts("train"), prompts("val")
    assert len(train) + len(val) == 200 and 2 <= len(val) <= 25
    every_second = write_rows(tmp_path / "b.jsonl", chat_rows(200)[::-2])
    assert prompts("val", every_second) <= val and prompts("train", every_second) <= train
    for n in range(2, 8):                                                            # a side that stays empty gets one
        small = write_rows(tmp_path / "c.jsonl", chat_rows(n))
        assert len(prompts("val", small)) >= 1 and len(prompts("train", small)) >= 1
    write_rows(small, chat_rows(3, split="val") + chat_rows(5, split="train")[3:])
    assert len(prompts("val", small)) == 3 and len(prompts("train", small)) == 2
    assert len(prompts("train", write_rows(small, chat_rows(1)))) == 1
    for source, kind, message in ((tmp_path / "none.jsonl", "sft", "none.jsonl: cannot be read"),
                                  (tmp_path, "sft", "cannot be read"),
                                  (path, "ppo", "objective must be sft, dpo or rl, got 'ppo'"),
                                  (write_rows(small, ["", " "]), "sft", "c.jsonl: must hold rows.*0 rows in all")):
        with pytest.raises(data.DataError, match=message):
            examples(source, tokenizer, kind)


def test_lone_surrogates_are_text(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "\ud800", "answer": "\udc00", "split": "train"}])
    batch = next(examples(path, tokenizer, micro_batch_size=1))
    (_, answer), = answers_of(tokenizer, batch, 0)
    assert tokenizer.decode(answer) == "\udc00"


def test_packing_loses_nothing_and_fills_rows():
    rng = random.Random(4)
    lengths = [[rng.randrange(1, 100), rng.randrange(1, 100)] for _ in range(500)]
    rows = data.pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i][side] for i in row) <= 100 for row in rows for side in (0, 1))
    single = [[a] for a, _ in lengths]
    assert sum(a for a, in single) / 100 / len(data.pack(single, 100)) > 0.85
    assert data.pack([[6], [5], [4], [3]], 10) == [[0, 2], [1, 3]] and data.pack([[10], [10]], 10) == [[0], [1]]


# ---- rewards


@pytest.mark.parametrize("answer, value", [
    ("def f(x):\n    return x", 1.0), ("import os\n@a\nasync def f(): pass", 1.0), ("x = 1", 0.0), ("", 0.0),
    ("def f(): pass\ndef g(): pass", 0.0), ("class A:\n    def f(self): pass", 0.0), ("def f(:", 0.0), ("\0", 0.0),
    ("def f(): return '\\d' is 1", 1.0), ("def f(): return " + "(" * 5000 + ")" * 5000, 0.0), ("\ud800", 0.0),
    ("def f(): return " + "-" * 100000 + "1", 0.0)], ids=range(12))
def test_parses(answer, value, recwarn):
    assert data.call_reward(data.find_reward("parses"), {}, answer) == value
    assert not recwarn.list


def test_follows_format():
    doc = {"prompt": data.WRITE_DOCSTRING + "def f(): pass"}
    function = {"prompt": data.WRITE_FUNCTION + "Do it."}
    for row, answer, value in ((doc, '"""It."""', 1.0), (doc, '"""It.', 0.0), (doc, "It.", 0.0), (doc, '""""""', 0.0),
                               (doc, '"""', 0.0), (doc, '""" \n"""', 0.0), (doc, '"' * 7, 0.0),
                               (doc, "def f(): 1", 0.0),
                               (function, "def f(): pass", 1.0), (function, "async def f(): pass", 1.0),
                               (function, "@a\ndef f(): pass", 1.0), (function, "define it", 0.0),
                               (function, '"""It."""', 0.0), (function, " def f(): pass", 0.0)):
        assert data.call_reward(data.REWARDS["format"], row, answer) == value, (row, answer)
        as_messages = {"messages": [{"role": "user", "content": row["prompt"]}, BOT]}
        assert data.follows_format(as_messages, answer) == value
    assert math.isnan(data.call_reward(data.REWARDS["format"], {"prompt": "Say hello."}, "hello"))


def test_a_reward_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\nSCALE = 2\ndef length(row, answer): return SCALE * len(answer)\n"
                    "def nan(row, answer): return math.nan\ndef text(row, answer): return 'good'\n"
                    "def fails(row, answer): return row['no\\nsuch']\ndef nothing(row, answer): pass\n")
    assert data.call_reward(data.find_reward(f"{file}:length"), {}, "four") == 8.0
    for name, message in (("nan", "reward nan: must give .* number, got nan"), ("text", "reward text.*got 'good'"),
                          ("nothing", "reward nothing.*got None"), ("fails", "reward fails: .* number .KeyError")):
        with pytest.raises(data.DataError, match=message) as error:
            data.call_reward(data.find_reward(f"{file}:{name}"), {}, "x")
        assert "\n" not in str(error.value)
    (tmp_path / "bad.py").write_text("raise SystemExit('a\\nb')\n")
    (tmp_path / "worse.py").write_text("def f(:\n")
    for name, message in (("length", "reward must be parses, format or FILE:FUNCTION"),
                          (f"{tmp_path}/no.py:f", "with a file that exists, got .*no.py:f'"),
                          (f"{file}:absent", "mine.py: must hold a function named absent"),
                          (f"{file}:SCALE", "mine.py: must hold a function named SCALE"),
                          (f"{tmp_path}/bad.py:f", "bad.py: raised while it was loaded .SystemExit: a b"),
                          (f"{tmp_path}/worse.py:f", "worse.py: raised while it was loaded .SyntaxError")):
        with pytest.raises(data.DataError, match=message) as error:
            data.find_reward(name)
        assert "\n" not in str(error.value)
