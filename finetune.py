"""After pre-training: instructions, preferences, rewards. Four stages, and one loss.

A base model continues text. Asked a question, it may well go on with a second question. Three later stages make it
answer, each with the weights of the one before (Ouyang 2022, arXiv:2203.02155):

    pretrain   predict the next token of text            a base model: it continues
    sft        predict the answer, given the prompt      it answers, in the form that it was shown
    dpo        prefer the chosen answer of a pair        it answers as people, or a judge, like it better
    rl         sample answers, reward the good ones      it gets what the reward pays for

All four follow the gradient of a weighted cross entropy. Only the weights w differ, so every stage takes the same
forward and backward pass, and the same way through tensor, pipeline and data parallelism (but rl, whose ranks each need
the whole model to sample from):

    gradient = d/dtheta of sum_t w_t nll_t / N, with w held fixed                nll_t = -log p(token t | those before)

    pretrain   w = 1                                                                             N = targets
    sft        w = 1 on the answer; a prompt has no targets                                      N = targets
    dpo        w = beta sigmoid(-margin) on the chosen answer, minus that on the rejected one    N = pairs
    rl         w = advantage - kl_coef x the sum of log p/p_start from this token on             N = answers

DPO. The reward that people's choices imply is, up to a constant per prompt, r = beta log p/p_start. Two answers then
differ by a margin, and sigmoid(margin) is the probability that the first is chosen:

    margin = beta (log p/p_start (chosen) - log p/p_start (rejected))      loss = -log sigmoid(margin)
    d loss / d nll of a chosen token = beta sigmoid(-margin)               the weight above

Reinforcement learning. An answer is sampled, a program or a judge gives it a number, and the gradient of the expected
number is E[reward x d log p]. Subtracting a baseline from the reward takes away variance, and no mean if the baseline
does not depend on the answer. Here it is the mean reward of a group of G answers to one prompt. The answer itself is
among them, so the expected gradient is smaller by the factor 1 - 1/G; dividing by the group's spread scales it again.
The price kl_coef per nat keeps p near p_start.

RLAIF. The preference may come from a model in the place of people: preference_rows with a judge.

Marks tell who speaks; where the tokenizer has marks of its own, no text can produce them. Only an answer's tokens are
targets. A conversation of n ids makes n - 1 inputs and n - 1 targets: its last id, </s>, is a target only.

    tokens     <s>  <|user|>  q_1  q_2  <|assistant|>  a_1  a_2   <s> ...  <pad>
    targets     -      -       -    -        a_1       a_2  </s>   -  ...    -
    documents   1      1       1    1         1         1    1     2  ...    3

    symbol         in code                what                                                    shape
    nll            nll                    nats of each target, 0 where there is none              (B, T)
    w              weights                what a token's nll counts                               (B, T)
    log p/p_start  log_ratio              of an answer under the model and the starting model     (B, documents), (B, T)
    A              advantage              reward minus its group's mean, over the group's spread  (B,)

Map: weights - chat - rows of a file - rewards - answers: rollouts, pairs, chat - what a model cannot know -
instructions from code. Not here: a reward model of its own, PPO's clipping (each batch of answers serves one update).
Sources: REINFORCE (Williams 1992), InstructGPT (Ouyang 2022, arXiv:2203.02155), RLAIF (Bai 2022, 2212.08073), DPO
(Rafailov 2023, 2305.18290), GRPO's baseline (Shao 2024, 2402.03300).

run: python finetune.py                          the demo
     python finetune.py instructions stdlib      make data/instructions.jsonl from this Python's functions
"""

import argparse
import ast
import functools
import hashlib
import importlib
import json
import math
import numbers
import re
import runpy
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

NO_TARGET = -1                       # in targets: nothing to predict here
ROLES = ("system", "user", "assistant")


class RowError(ValueError):
    """A file of rows or a reward that cannot be used: one line that names the file, the rule and the value."""


# ---- weights ---------------------------------------------------------------------------------------------------------

def dpo_loss(log_ratio_chosen, log_ratio_rejected, beta):
    """DPO as on the board (eq. 7). log_ratio (pairs,): log p/p_start of each answer, with its gradient."""
    return -F.logsigmoid(beta * (log_ratio_chosen - log_ratio_rejected)).mean()


def reinforce_loss(log_p, advantage):
    """The policy gradient as on the board. log_p (answers,): log-probability of each answer, with its gradient."""
    return -(advantage * log_p).mean()


# The same gradients, as weights of tokens. A function takes (batch, nll (B, T), config) and returns two things: the
# weights (B, T), and a tensor of three sums over the batch, the loss and two statistics (named in OBJECTIVES). nll
# comes from a pass without gradient.

def preference(batch, nll, c):
    """DPO (Rafailov 2023, arXiv:2305.18290, eq. 7). Rows 2u and 2u + 1 hold the chosen and the rejected answers to the
    same prompts. documents (B, T): the number, from 1, of the answer that a token belongs to. reference (B, documents):
    nll of each answer under the starting model, at its number."""
    answer, documents = batch["targets"] >= 0, batch["documents"]
    zeros = torch.zeros_like(batch["reference"])

    def per_answer(x):                                          # sums of an answer's tokens: (B, T) -> (B, documents)
        return zeros.scatter_add(1, documents, (x * answer).to(zeros.dtype))

    # margin = beta (log p/p_start (chosen) - log p/p_start (rejected))                        (B/2, documents)
    log_ratio = batch["reference"] - per_answer(nll)
    margin = c.beta * (log_ratio[0::2] - log_ratio[1::2])
    # loss = -log sigmoid(margin), whose derivative by a chosen token's nll is beta sigmoid(-margin)
    w = c.beta * torch.sigmoid(-margin)
    of_answer = torch.stack((w, -w), dim=1).flatten(0, 1)      # (B, documents): row 2u has w, row 2u + 1 has -w
    weights = of_answer.gather(1, documents) * answer          # to the answer's tokens: (B, T)
    is_pair = per_answer(torch.ones_like(nll))[0::2] > 0       # column 0 and the padding have no target
    sums = [x[is_pair].double().sum() for x in (F.softplus(-margin), margin > 0, margin)]
    return weights.to(nll.dtype), torch.stack(sums)


def policy_gradient(batch, nll, c):
    """REINFORCE (Williams 1992) with the baseline of GRPO (arXiv:2402.03300), Rollouts' advantage. The sum of
    log p - log p_start over an answer is, on average, KL(p, p_start). A token changes itself and the tokens after it,
    so its weight has the price of those, and not of the tokens before it."""
    answer = batch["targets"] >= 0
    log_ratio = (batch["reference"] - nll) * answer
    to_come = log_ratio.flip(1).cumsum(1).flip(1)                              # to_come[t] = sum_{s >= t} log_ratio[s]
    weights = (batch["advantage"][:, None] - c.kl_coef * to_come).to(nll.dtype) * answer
    return weights, torch.stack([x.double().sum() for x in (weights * nll, batch["reward"], log_ratio)])


OBJECTIVES = {"dpo": (preference, ("accuracy", "margin")), "rl": (policy_gradient, ("reward", "kl"))}


# ---- chat ------------------------------------------------------------------------------------------------------------

# Who speaks is told by marks. Each family of models has its own; a model that goes on training keeps those it knows.
# name: (before a turn's content, after an assistant's content, after any other's). <|...|> and {eos} are one special
# token each, the rest is text. The last one needs no marks of roles: for GPT-2, say.
CHAT_FORMATS = {
    "ours":   ("<|{role}|>", "{eos}", ""),
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_end|>\n"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
    "plain":  ("### {role}:\n", "{eos}\n\n", "\n\n")}
MARK = re.compile(r"(<\|\w+\|>|{eos})")


def mark_id(tokenizer, mark: str) -> int | None:
    """The id of a mark of CHAT_FORMATS, of {bos} or {pad}; None if the tokenizer has none."""
    known = {"{bos}": "bos_id", "{eos}": "eos_id", "{pad}": "pad_id"}
    i = getattr(tokenizer, known[mark], None) if mark in known else tokenizer.special_id(mark)
    return None if i == -1 else i                                              # -1: SentencePiece's word for none


def chat_format(tokenizer) -> tuple[str, str, str]:
    """The first of CHAT_FORMATS whose marks the tokenizer has."""
    for chat in CHAT_FORMATS.values():
        marks = MARK.findall("".join(text.replace("{role}", role) for text in chat for role in ROLES))
        if all(mark_id(tokenizer, mark) is not None for mark in marks):
            return chat
    raise RowError("tokenizer: must have an end-of-text token to end an answer with, it has none")


def encode_chat(tokenizer, messages, reply: bool = False) -> tuple[list[int], list[bool]]:
    """[{"role", "content"}, ...] -> two lists of one length, (ids, is_answer). is_answer: whether the assistant must
    produce the token, which is in its content or is the mark that ends its turn. reply: end with the assistant's
    opening, ready to generate."""
    before, after_answer, after_other = chat_format(tokenizer)
    tokens = [] if mark_id(tokenizer, "{bos}") is None else [(tokenizer.bos_id, False)]

    def marks(text, answer=False):
        for part in MARK.split(text):                          # text between marks, chatml's \n, is part of no answer
            if MARK.fullmatch(part):
                yield mark_id(tokenizer, part), answer
            else:
                yield from ((i, False) for i in tokenizer.encode(part))

    for message in messages:
        answer = message["role"] == "assistant"
        tokens += marks(before.replace("{role}", message["role"]))
        tokens += ((i, answer) for i in tokenizer.encode(message["content"]))     # by itself: no piece crosses a mark
        tokens += marks(after_answer if answer else after_other, answer)
    if reply:
        tokens += marks(before.replace("{role}", "assistant"))
    return [i for i, _ in tokens], [answer for _, answer in tokens]


def end_of_turn(tokenizer) -> int:
    """The id that ends an assistant's answer."""
    return mark_id(tokenizer, MARK.findall(chat_format(tokenizer)[1])[-1])


def chat_template(tokenizer) -> str:
    """The convention of encode_chat as a Jinja template, what Hugging Face calls chat_template. It reads messages,
    add_generation_prompt, bos_token and eos_token."""
    def expression(text):
        names = {"{role}": "message['role']", "{eos}": "eos_token"}
        return " + ".join(names.get(part, repr(part)) for part in re.split("({role}|{eos})", text) if part) or "''"

    before, after_answer, after_other = chat_format(tokenizer)
    after = f"({expression(after_answer)} if message['role'] == 'assistant' else {expression(after_other)})"
    return ("{{ bos_token }}{% for message in messages %}{{ " + f"{expression(before)} + message['content'] + {after}"
            + " }}{% endfor %}{% if add_generation_prompt %}{{ "
            + expression(before.replace("{role}", "assistant")) + " }}{% endif %}")


# ---- examples --------------------------------------------------------------------------------------------------------

def need(fact, rule: str, value):
    if not fact:
        raise RowError(f"{rule}, got {value!r:.80}")


def conversation(row, objective: str) -> tuple[list[dict], list[str]]:
    """A row of a fine-tuning file -> (the messages before the answer, the answers: one for sft; chosen, rejected for
    dpo; none for rl). Raises RowError with the rule."""
    need(isinstance(row, dict), "a row must be a JSON object", row)
    need(row.get("split", "train") in ("train", "val"), 'split must be "train" or "val"', row.get("split"))
    fields = {"sft": ["answer"], "dpo": ["chosen", "rejected"], "rl": []}[objective]
    # a row is a whole conversation whose last message is the answer, or a prompt and its answers; both become turns
    whole = "messages" in row and objective != "dpo"
    need(whole or {"prompt", *fields} <= row.keys(), f"a row of {objective} must have "
         f"{'' if objective == 'dpo' else 'messages, or '}{', '.join(['prompt', *fields])}", list(row))
    turns = row["messages" if whole else "prompt"]
    if isinstance(turns, str) and not whole:
        turns = [{"role": "user", "content": turns}]
    need(isinstance(turns, list) and turns,
         f"{'messages must be' if whole else 'prompt must be a string or'} a list of messages", turns)
    if not whole:
        turns = turns + [{"role": "assistant", "content": row[field]} for field in fields]
    for turn in turns:
        need(isinstance(turn, dict) and {"role", "content"} <= turn.keys(), "a message must have role, content", turn)
        need(turn["role"] in ROLES, f"role must be one of {', '.join(ROLES)}", turn["role"])
        need(isinstance(turn["content"], str), "content must be a string", turn["content"])
        need(turn["role"] != "assistant" or turn["content"].strip(), "an answer must not be empty", turn["content"])
    prompt_length = len(turns) - (1 if whole else len(fields))
    prompt, answers = turns[:prompt_length], [turn["content"] for turn in turns[prompt_length:]]
    need(not whole or turns[-1]["role"] == "assistant", "the last message must be the assistant's", turns[-1]["role"])
    need(whole or prompt[-1]["role"] != "assistant", "a prompt must not end with the assistant's message", prompt[-1])
    need(len(set(answers)) == len(answers), "chosen and rejected must differ", answers)
    return prompt, [] if objective == "rl" else answers


def pack(lengths, size: int, num_open: int = 16) -> list[list[int]]:
    """Items -> rows of `size` places: the first of the newest `num_open` rows where an item fits, or a new one.
    lengths[i]: the item's length on every side of a row, at most size; it must fit on all.

    >>> pack([[6], [5], [4], [3]], 10)
    [[0, 2], [1, 3]]
    """
    rows, space = [], []
    for item, length in enumerate(lengths):
        for row in range(max(0, len(rows) - num_open), len(rows)):
            if all(free >= n for free, n in zip(space[row], length, strict=True)):
                break
        else:
            row = len(rows)
            rows.append([])
            space.append([size] * len(length))
        rows[row].append(item)
        space[row] = [free - n for free, n in zip(space[row], length, strict=True)]
    return rows


class Examples:
    """A fine-tuning file, a .jsonl, as windows of seq_len tokens. Every line is checked at the start. Raises RowError,
    FILE:LINE.

    sft   {"messages": [{"role", "content"}, ...]} or {"prompt", "answer"}. A window holds whole conversations, packed;
          targets are the answers' tokens, else NO_TARGET; count: how many targets a batch has.
    dpo   {"prompt", "chosen", "rejected"}. Window 2 u holds chosen answers, window 2 u + 1 the rejected ones of the
          same prompts, document by document; they come together. count: pairs; window (B,): numbers of the windows.
    rl    {"prompt"}, or a row of sft, whose last answer is not used. A batch is a list of (ids of the prompt, row).

    A prompt is a str or a list of messages. "split" says train or val; else hold_out does: texts of prompts -> the set
    of those that are for validation. What does not fit into a window is cut at its end. documents: 1, 2, ... in a
    window, the padding last; num_documents: the largest of these, so a table by id has num_documents + 1 columns.
    """

    def __init__(self, path, tokenizer, *, objective: str, seq_len: int, split: str = "train",
                 hold_out=lambda texts: set()):
        self.path, self.seq_len, self.split = Path(path), seq_len, split
        need(objective in ("sft", "dpo", "rl"), "objective must be sft, dpo or rl", objective)
        self.objective, self.tokenizer = objective, tokenizer
        self.rows_together = 2 if objective == "dpo" else 1             # windows that keep together in any order
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise RowError(f"{path}: cannot be read ({error.strerror})") from None
        examples, dropped, splits = [], Counter(), {"train": [], "val": []}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                if line.strip():
                    row = json.loads(line)
                    prompt, answers = conversation(row, objective)
                    text = "".join(message["content"] for message in prompt)
                    if sides := self.encode(prompt, answers, dropped):
                        examples.append((row, text, sides))
            except (ValueError, RecursionError) as error:
                rule = error if isinstance(error, RowError) else f"a row must be JSON, got {line!r:.80}"
                raise RowError(f"{path}:{number}: {rule}") from None
        held_out = hold_out({text for row, text, _ in examples if "split" not in row})
        for row, text, sides in examples:
            splits[row.get("split", "val" if text in held_out else "train")].append((row, sides))
        self.examples = splits[self.split]
        if not self.examples and self.split == "train":
            raise RowError(f"{path}: must hold rows of the {self.split} split for {objective}, "
                            f"it has {len(examples)} rows in all, dropped: {dict(dropped)}")
        key = hashlib.sha256(content).hexdigest(), tokenizer.sha256, objective, self.seq_len
        self.manifest = {
            "sources": [str(path)], "knowledge_cutoff": None, "dropped": dict(dropped),
            "fingerprint": hashlib.sha256(repr(key).encode()).hexdigest(),
            "splits": {name: {"documents": len(rows), "tokens": sum(len(ids) for _, sides in rows for ids, _ in sides),
                              "bytes": sum(len(tokenizer.bytes[i]) for _, sides in rows for _, targets in sides
                                           for i in targets.tolist() if i != NO_TARGET)}
                       for name, rows in splits.items()}}
        # n tokens are n - 1 inputs and, one later, n - 1 targets
        self.rows = pack([[len(ids) - 1 for ids, _ in sides] for _, sides in self.examples], self.seq_len)
        self.num_windows = len(self.examples) if objective == "rl" else len(self.rows) * self.rows_together
        self.num_documents = max(map(len, self.rows), default=0) + 1
        self.reference = None        # dpo: (num_windows, num_documents + 1) nll of each answer under the starting model

    def encode(self, prompt: list[dict], answers: list[str], dropped: Counter):
        """-> for every answer (or, for rl, for the prompt) its ids and targets, (2, n) int32, n <= T + 1: a target is
        the id itself or NO_TARGET. None if it is dropped."""
        opening, _ = encode_chat(self.tokenizer, prompt, reply=True)
        if self.objective == "rl":
            if self.seq_len - len(opening) < self.seq_len / 4:
                dropped["prompt leaves less than seq_len / 4"] += 1
                return None
            return [np.array([opening, [NO_TARGET] * len(opening)], np.int32)]
        sides, size = [], self.seq_len + 1
        for answer in answers:
            ids, is_answer = encode_chat(self.tokenizer, [*prompt, {"role": "assistant", "content": answer}])
            if self.objective == "dpo":                       # earlier answers of a conversation are part of its prompt
                is_answer[:len(opening)] = [False] * len(opening)
            sides.append(np.array([ids, np.where(is_answer, ids, NO_TARGET)], np.int32))
        if any((targets[:size] == NO_TARGET).all() for _, targets in sides):
            dropped["answer cut to nothing"] += 1
            return None
        if any(targets.size > size for _, targets in sides):
            dropped["tail cut"] += 1
        return [side[:, :size] for side in sides]

    def read(self, window: np.ndarray):
        """The windows of these numbers (B,): a dict of (B, T) int64 tensors and count; for rl a list."""
        if self.objective == "rl":
            return [(self.examples[w][1][0][0].tolist(), self.examples[w][0]) for w in window]
        pad = mark_id(self.tokenizer, "{pad}")
        tokens = np.full((len(window), self.seq_len), self.tokenizer.eos_id if pad is None else pad)
        targets, documents = np.full_like(tokens, NO_TARGET), np.zeros_like(tokens)
        for b, (row, side) in enumerate(zip(*np.divmod(window, self.rows_together), strict=True)):
            start = 0
            for number, item in enumerate(self.rows[row], 1):
                ids, answer = self.examples[item][1][side]
                end = start + len(ids) - 1
                tokens[b, start:end], targets[b, start:end], documents[b, start:end] = ids[:-1], answer[1:], number
                start = end
            documents[b, start:] = len(self.rows[row]) + 1
        batch = {"tokens": tokens, "targets": targets, "documents": documents}
        if self.objective == "dpo":
            batch |= {"window": window, "count": np.array(sum(len(self.rows[w // 2]) for w in window if w % 2 == 0))}
            if self.reference is not None:
                batch["reference"] = self.reference[window]
        else:
            batch |= {"count": np.array((targets != NO_TARGET).sum())}
        return {name: torch.as_tensor(value) for name, value in batch.items()}


# ---- rewards ---------------------------------------------------------------------------------------------------------

def parses(row: dict, answer: str) -> float:
    """1.0 if the answer is Python and holds exactly one function at its top level, else 0.0."""
    try:
        body = parse_python(answer).body
    except NOT_PYTHON:
        return 0.0
    return float(sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in body) == 1)


def follows_format(row: dict, answer: str) -> float:
    """1.0 if the answer to a prompt of instructions() looks like what was asked for, else 0.0; nan: another prompt."""
    prompt, _ = conversation(row, "rl")
    text = prompt[-1]["content"] if prompt else ""
    if text.startswith(WRITE_DOCSTRING):
        quoted = answer.startswith('"""') and answer.endswith('"""')
        return float(quoted and bool(answer.strip('"').strip()))
    return float(answer.startswith(("def ", "async def ", "@"))) if text.startswith(WRITE_FUNCTION) else math.nan


REWARDS = {"parses": parses, "format": follows_format}       # f(row of the file, answer) -> a number


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@functools.cache                                             # a file of rewards is run once
def find_reward(name: str):
    """A function of REWARDS by its name, or FILE:FUNCTION from a Python file. Raises RowError."""
    if name in REWARDS:
        return REWARDS[name]
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise RowError(f"reward must be {', '.join(REWARDS)} or FILE:FUNCTION with a file that exists, got {name!r}")
    try:
        found = runpy.run_path(file).get(function)
    except (Exception, SystemExit) as error:
        raise RowError(f"{file}: raised while it was loaded ({one_line(error)})") from None
    if not callable(found):
        raise RowError(f"{file}: must hold a function named {function}, it does not")
    return found


def call_reward(reward, row: dict, answer: str) -> float:
    """reward(row, answer), checked: a finite number; nan from follows_format alone. Raises RowError."""
    name = getattr(reward, "__name__", reward)
    try:
        value = reward(row, answer)
    except Exception as error:
        raise RowError(f"reward {name} must give a finite number, it raised {one_line(error)}") from None
    if not isinstance(value, numbers.Real) or not (math.isfinite(value) or reward is follows_format):
        raise RowError(f"reward {name} must give a finite number, got {value!r:.80}")
    return float(value)


# ---- answers: rollouts, pairs, chat ----------------------------------------------------------------------------------

def rows_of(prompts, answers) -> dict:
    """Prompts and their answers, lists of ids -> dict(tokens, targets), (B, T) int64, one row each, as long as the
    longest needs. Targets are the answers' ids, NO_TARGET elsewhere. Padding comes last: causal attention needs no mask
    for it."""
    T = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) - 1
    tokens, targets = torch.zeros(len(prompts), T, dtype=torch.int64), torch.full((len(prompts), T), NO_TARGET)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) - 1
        tokens[row, :end] = torch.tensor((prompt + answer)[:-1])
        targets[row, len(prompt) - 1:end] = torch.tensor(answer, dtype=torch.int64)
    return {"tokens": tokens, "targets": targets}


class Rollouts:
    """The loader of reinforcement learning: answers that the model samples as it is now, and what they are worth.

    A batch is dict(tokens, targets, advantage, reward, count, reference).
    - prompts: an iterator of [(ids of the prompt, row), ...], with position, dp_rank and micro_batch_size.
    - sample(prompts, numbers): lists of ids -> their answers; an answer depends on its number and the weights alone.
    - start: the starting model, start(tokens, targets) -> (loss, nll).
    - c: has reward, group_size.
    """

    def __init__(self, prompts, tokenizer, sample, start, c):
        self.prompts, self.tokenizer, self.sample, self.start, self.c = prompts, tokenizer, sample, start, c
        self.reward = find_reward(c.reward)

    def __next__(self) -> dict:
        prompts, group = self.prompts, self.c.group_size
        # the number of this rank's first answer, before next() moves the position
        first = (prompts.position + prompts.dp_rank * prompts.micro_batch_size) * group
        questions = [question for question in next(prompts) for _ in range(group)]
        ids = [prompt for prompt, _ in questions]
        answers = self.sample(ids, range(first, first + len(ids)))
        rewards = [call_reward(self.reward, row, self.tokenizer.decode(answer))
                   for (_, row), answer in zip(questions, answers, strict=True)]
        if math.isnan(sum(rewards)):
            raise RowError(f"reward must say something of every prompt, {self.c.reward} does not")
        # advantage = (reward - mean of its group) / spread of its group; in float64: equal rewards give 0
        rewards = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
        advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
        batch = rows_of(ids, answers) | {"reward": rewards.flatten(), "advantage": advantage.flatten(),
                                         "count": torch.tensor(rewards.numel())}
        batch["reference"] = nll_of(self.start, batch)
        return batch


@torch.no_grad()
def nll_of(gpt, batch) -> torch.Tensor:
    """nats of each target (B, T) of a batch under a model, on the model's device; 0 where there is no target."""
    device = next(gpt.parameters()).device
    return gpt(batch["tokens"].to(device), batch["targets"].to(device))[1]


def nll_per_token(gpt, prompts, answers) -> torch.Tensor:
    """(n,) nats per token of each answer to its prompt, lists of ids."""
    batch = rows_of(prompts, answers)
    nll = nll_of(gpt, batch).cpu()
    return nll.sum(1) / (batch["targets"] >= 0).sum(1).clamp(min=1)


def preference_rows(prompts: Examples, sample, judge=None, most: int = 1200, batch_size: int = 64):
    """Yields a row of dpo for each prompt, or None where its two answers are equal or one is empty. Without a judge the
    row's own answer is chosen over a sampled one. With one (RLAIF: feedback from another model), two answers are
    sampled, and chosen is the one that the judge, a model of the same tokenizer, finds more probable per token.

    sample(prompts, numbers) -> answers, lists of ids. most: prompts that are answered. Raises RowError.
    """
    decode, split = prompts.tokenizer.decode, prompts.split
    for first in range(0, min(prompts.num_windows, most), batch_size):
        places = range(first, min(first + batch_size, prompts.num_windows, most))
        ids, rows = zip(*prompts.read(np.array(places)), strict=True)
        if judge is None:
            real = [conversation(row, "sft")[1][0] for row in rows]                         # RowError if it has none
            pairs = zip(real, map(decode, sample(ids, [f"{split}/{place}/0" for place in places])), strict=True)
        else:
            a, b = (sample(ids, [f"{split}/{place}/{side}" for place in places]) for side in (0, 1))
            a_is_better = nll_per_token(judge, ids, a) < nll_per_token(judge, ids, b)
            pairs = ((decode(x), decode(y)) if better else (decode(y), decode(x))
                     for x, y, better in zip(a, b, a_is_better, strict=True))
        for row, (chosen, rejected) in zip(rows, pairs, strict=True):
            differ = chosen != rejected and chosen.strip() and rejected.strip()
            yield {"prompt": conversation(row, "rl")[0], "chosen": chosen, "rejected": rejected,
                   "split": split} if differ else None


def chat(tokenizer, answer, most_tokens: int):
    """A conversation on the terminal: each line is a message. When it is more than most_tokens, its oldest messages are
    forgotten, but for the last one. answer(ids of the conversation, number of the answer) -> text."""
    messages = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> " if sys.stdin.isatty() else "")})
        except EOFError:
            return
        while len(ids := encode_chat(tokenizer, messages, reply=True)[0]) > most_tokens and len(messages) > 1:
            del messages[:2]
        text = answer(ids, len(messages) - 1)
        print(text, flush=True)
        messages.append({"role": "assistant", "content": text})


# ---- what a model cannot know ----------------------------------------------------------------------------------------

# functions and classes of newer Pythons: 3.12, 3.13, 3.14 ("What's New" of each, docs.python.org)
NEWER_NAMES = """itertools.batched calendar.Month calendar.Day math.sumprod inspect.markcoroutinefunction
    threading.setprofile_all_threads random.binomialvariate statistics.kde pathlib.UnsupportedOperation copy.replace
    queue.ShutDown warnings.deprecated os.process_cpu_count base64.z85encode glob.translate mimetypes.guess_file_type
    types.CapsuleType typing.ReadOnly typing.TypeIs statistics.kde_random heapq.heappush_max functools.Placeholder
    operator.is_none io.Reader os.reload_environ uuid.uuid7 asyncio.capture_call_graph pdb.set_default_backend
    inspect.ispackage""".split()


def names_before_and_after() -> dict:
    """{"known": [(module, name), ...], "new": ...}: functions and classes of this Python's library, and of a later one.
    A model that read this library has met the first; it cannot have met the second."""
    found = {"known": [], "new": []}
    for place, name in (each.split(".") for each in NEWER_NAMES):
        module = importlib.import_module(place)
        if not hasattr(module, name):
            found["new"].append((place, name))
            names = getattr(module, "__all__", dir(module))
            names = [n for n in names if n[0] != "_" and len(n) > 3 and callable(getattr(module, n))]
            found["known"] += [(place, n) for n in names[::max(1, len(names) // 3)][:3]]        # three of the module's
    return {kind: sorted(set(names)) for kind, names in found.items()}


def imported_module(text: str) -> str | None:
    """The top-level module that an import statement names, whose keyword stands before `text`."""
    match = re.match(r" ([A-Za-z_]\w*)", text)
    return match and match[1]


def longest_copy(text: bytes, corpus: bytes) -> bytes:
    """The longest part of `text` that occurs in `corpus`."""
    best, start = b"", 0
    while start + len(best) < len(text):
        if text[start:start + len(best) + 1] in corpus:                       # one more byte, or else one place later
            best = text[start:start + len(best) + 1]
        else:
            start += 1
    return best


def probe(models, ask, tokenizer, begin: int, cutoff: str, corpus: bytes = b"", unseen=()):
    """How a language model is wrong, printed. It names modules that do not exist; of what is newer than its text it
    knows nothing; and some of its text it repeats word for word.

    models: (step, model) of each checkpoint, oldest first. ask(gpt, text, n, most_tokens, temperature) -> n texts that
    go on with it. begin: the id that begins a document. corpus: the training text; unseen: parts of held-out text.
    """
    temperatures, openings = (0.3, 0.6, 1.0, 1.5), ('"""A module."""\n\nimport', '"""A module."""\n\nfrom')
    print("share of imported modules that do not exist (128 samples)\n  temperature  "
          + "".join(f"{t:>8}" for t in temperatures))
    for step, gpt in models:
        shares = []
        for temperature in temperatures:
            texts = [text for opening in openings for text in ask(gpt, opening, 64, 8, temperature)]
            names = [name for text in texts if (name := imported_module(text))]
            shares.append(sum(name not in sys.stdlib_module_names for name in names) / max(1, len(names)))
        print(f"  step {step:>8}" + "".join(f"{share:8.1%}" for share in shares))
    newest = gpt

    print(f"\nknowledge cutoff {cutoff}: names after `import MODULE`, nats per byte")
    for kind, names in names_before_and_after().items():
        if names:                                                          # a Python that has all of them knows of none
            prompts = [[begin] + tokenizer.encode(f"import {module}\n\n{module}.") for module, _ in names]
            answers = [tokenizer.encode(name) for _, name in names]
            nll = nll_per_token(newest, prompts, answers) * torch.tensor([len(ids) for ids in answers])
            loss = (nll / torch.tensor([len(name) for _, name in names])).mean()
            whose = "the library that it read" if kind == "known" else "newer Pythons"
            print(f"  functions of {whose:<24} {loss:6.3f}")

    if corpus:
        samples = [sample.encode("utf-8", "replace")[:400] for sample in ask(newest, "", 8, 160, 1.0)]
        print("\nlongest part that stands word for word in the training text, median and most, bytes of 400")
        for name, parts in (("samples", samples), ("held-out text", unseen)):
            copies = sorted((longest_copy(part, corpus) for part in parts), key=len)
            print(f"  {name:<14} {len(copies[len(copies) // 2]):>4} {len(copies[-1]):>4}   "
                  f"{copies[-1].decode('utf-8', 'replace')!r}")


# ---- instructions ----------------------------------------------------------------------------------------------------

WRITE_DOCSTRING = "Write the docstring of this function.\n\n"
WRITE_FUNCTION = "Write a function with this docstring.\n\n"
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse_python(text: str) -> ast.Module:
    """The syntax tree of a text; raises one of NOT_PYTHON, prints no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def functions(body):
    """The functions among statements, and the methods of their classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body)


def function_rows(text: str):
    """(prompt, answer) twice for every function that has a docstring and a body: write either from the other."""
    for node in functions(parse_python(text).body):
        docstring = ast.get_docstring(node)                                    # cleaned by inspect.cleandoc
        if docstring and len(node.body) > 1:
            node.body = node.body[1:]
            function = ast.unparse(node)
            yield WRITE_DOCSTRING + function, f'"""{docstring}"""'
            yield WRITE_FUNCTION + docstring, function


def instructions(documents, held_out: set, max_chars: int = 600) -> tuple[list, list, Counter]:
    """Python files' texts -> rows of sft, the rows' prompts that ask for a function (for rewards), what was dropped.

    A row is on its document's side: documents in held_out, which a base model did not read, make rows of split "val".
    A prompt is on one side alone. Rows of more than max_chars characters are dropped, so are repeated ones.
    """
    dropped, rows, prompts = Counter(), {}, {}
    for text in sorted(documents, key=lambda text: text not in held_out):               # held-out documents first
        split = "val" if text in held_out else "train"
        try:
            pairs = list(function_rows(text))
        except NOT_PYTHON:
            dropped["not Python"] += 1
            continue
        for prompt, answer in pairs:
            if len(prompt) + len(answer) > max_chars:
                dropped["too long"] += 1
            elif (prompt, answer) in rows:
                dropped["duplicate row"] += 1
            elif prompts.setdefault(prompt, split) != split:                             # where it was seen first
                dropped["prompt is held out"] += 1
            else:
                rows[prompt, answer] = split
    chats = [{"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
              "split": split} for (prompt, answer), split in rows.items()]
    functions_asked = [{"prompt": p, "split": split} for p, split in prompts.items() if p.startswith(WRITE_FUNCTION)]
    return chats, functions_asked, dropped


# ---- command line and demo -------------------------------------------------------------------------------------------

def main(argv):
    import data
    parser = argparse.ArgumentParser(description="Make a fine-tuning file from the functions of Python files.")
    parser.add_argument("instructions", choices=["instructions"], help="the word instructions")
    parser.add_argument("sources", nargs="+", help="files, folders, globs (.txt, .md, .py, .jsonl), or the word stdlib")
    parser.add_argument("--out", default="data/instructions.jsonl", help="the .jsonl to write (default %(default)s); "
                        "its prompts go into prompts.jsonl in the same folder")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of documents held out, as in data.py "
                                                                         "(default %(default)s)")
    parser.add_argument("--max-chars", type=int, default=600, help="longest row (default %(default)s)")
    args = parser.parse_args(argv)
    out, dropped_files = Path(args.out), defaultdict(list)
    try:
        if out.name == "prompts.jsonl":
            raise RowError(f"{out}: out must have another name, prompts.jsonl is written in the same folder")
        documents = list(data.read_documents(data.source_files(args.sources), dropped_files))
        val, _ = data.split_documents({data.text_hash(text): len(text.encode()) for text in documents},
                                      args.val_fraction)
        held_out = {text for text in documents if data.text_hash(text) in val}
        rows, prompts, dropped = instructions(documents, held_out, args.max_chars)
        dropped.update({reason: len(paths) for reason, paths in dropped_files.items()})
        if not rows:
            raise RowError(f"{out}: sources must hold functions with docstrings, dropped: {dict(dropped)}")
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((out, rows), (out.with_name("prompts.jsonl"), prompts)):
            data.write_atomic(path, "".join(json.dumps(row) + "\n" for row in content))
    except (RowError, data.DataError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    counts = Counter(row["split"] for row in rows)
    print(f"{out}: {({**counts, 'prompts': len(prompts), 'dropped': dict(dropped)})}")
    return 0


def demo():
    """The claims of this file, measured | predicted, asserted. Needs nothing; some seconds."""
    import tempfile
    from types import SimpleNamespace

    def row(what, measured, predicted, ok):
        print(f"{what:<66} {measured:>12} | {predicted:>12} | {'ok' if ok else 'WRONG'}")
        assert ok, what

    print(f"{'':66} {'measured':>12} | {'predicted':>12} |")
    # one weighted cross entropy has the gradient of each objective; here on logits, with random answers
    torch.manual_seed(0)
    B, T, V, beta = 6, 12, 17, 0.3
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    start = torch.randn(B, T, V, dtype=torch.float64)
    targets = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, NO_TARGET)
    nll, nll_start = (F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=NO_TARGET)
                      .view(B, T) for x in (logits, start))
    c = SimpleNamespace(beta=beta, kl_coef=0.0)

    def difference(loss, weights, count):
        (board,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (ours,) = torch.autograd.grad((weights * nll).sum() / count, logits, retain_graph=True)
        return float((ours - board).abs().max() / board.abs().max())

    log_ratio = (nll_start - nll).sum(1)
    batch = {"targets": targets, "documents": torch.zeros(B, T, dtype=torch.int64),
             "reference": nll_start.sum(1, keepdim=True)}
    error = difference(dpo_loss(log_ratio[0::2], log_ratio[1::2], beta), preference(batch, nll.detach(), c)[0], B // 2)
    row("dpo: weighted cross entropy's gradient, relative difference", f"{error:.0e}", "0", error < 1e-14)
    advantage = torch.randn(B, dtype=torch.float64)
    batch = {"targets": targets, "reference": nll_start, "advantage": advantage, "reward": advantage}
    error = difference(reinforce_loss(-nll.sum(1), advantage), policy_gradient(batch, nll.detach(), c)[0], B)
    row("rl: weighted cross entropy's gradient, relative difference", f"{error:.0e}", "0", error < 1e-14)

    # the baseline: any number may be taken from all rewards of a prompt, since E[d log p] = 0
    p = start[0, 0].softmax(0)
    expected = float((p[:, None] * (torch.eye(V) - p)).sum(0).abs().max())
    row("E[d log p / d logits], why a baseline moves no mean", f"{expected:.0e}", "0", expected < 1e-15)

    import data
    with tempfile.TemporaryDirectory() as folder:
        documents = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[c-d]*.py"))]
        rows, prompts, _ = instructions(documents, data.held_out(documents, 0.2))
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        tokenizer = data.Tokenizer.train(documents, 512)
        examples = Examples(Path(folder, "rows.jsonl"), tokenizer, objective="sft", seq_len=256)
        batch = examples.read(np.arange(examples.num_windows))
    ids, is_answer = encode_chat(tokenizer, rows[0]["messages"])
    text = tokenizer.decode([i for i, answer in zip(ids, is_answer, strict=True) if answer])
    print(f"\n{len(rows)} rows from {len(documents)} files; the first answer:\n{text}\n")
    same = text == rows[0]["messages"][1]["content"]
    row("tokens that the assistant must produce, decoded, are the answer", same, True, same)
    filled = sum(len(ids) - 1 for _, sides in examples.examples for ids, _ in sides)
    places = batch["tokens"].numel()
    unpacked = len(examples.examples) * examples.seq_len
    row("share of a window's places that packing fills", f"{filled / places:.1%}", "> 85%", filled / places > 0.85)
    print(f"{'      one row per window would fill':<66} {filled / unpacked:>12.1%} |")
    answers = [r["messages"][1]["content"] for r in rows if r["messages"][0]["content"].startswith(WRITE_FUNCTION)]
    reward = sum(parses({}, answer) for answer in answers) / len(answers)
    row("mean reward `parses` of the functions that people wrote", reward, 1.0, reward == 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else demo())
