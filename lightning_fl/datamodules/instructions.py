"""Instructions and responses by client, tokenized for causal language models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.types import ClientId, as_client_id

IGNORED = -100
"""The label of a token that is not predicted."""
PAD, END = "<pad>", "<end>"


class InstructionDataModule(NaturalDataModule):
    """Instructions and responses by client, from a file of JSON lines; only the responses are predicted.

    A batch is a mapping with ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape ``[batch, length]``, as
    :class:`~lightning_fl.models.CausalLM` reads it: the instruction in the template, the response and the end token;
    the labels of the instruction and of padding are -100. With ``rejected`` it has the same three entries for the
    rejected responses, ``rejected_input_ids`` and so on, for :class:`~lightning_fl.models.DPO`.

    Args:
        path: The file; each line is a JSON object with the columns below.
        client: The column that names the example's client.
        instruction: The column of the instruction.
        response: The column of the response.
        rejected: The column of a rejected response. None: there is none.
        tokenizer: A ``tokenizer.json`` of the tokenizers library, with the tokens ``<pad>`` and ``<end>``. None: a
            byte-level BPE is trained on this file, which suits a simulation; silos need a common tokenizer, and get an
            error if theirs differ.
        vocabulary_size: Number of tokens of the BPE that is trained.
        template: The text before the response, with ``{instruction}``.
        max_length: Maximum number of tokens of an example; the instruction of a longer one is cut at its end.
        batch_size: Examples per training batch.
        **kwargs: ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ImportError: On setup, if tokenizers is not installed.
        ValueError: If an argument is out of range; on setup, if a line is not as described.
    """

    def __init__(
        self,
        path: str | Path,
        client: str = "client",
        instruction: str = "instruction",
        response: str = "response",
        rejected: str | None = None,
        tokenizer: str | Path | None = None,
        vocabulary_size: int = 512,
        template: str = "{instruction}\n",
        max_length: int = 128,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        if "{instruction}" not in template or max_length < 2 or vocabulary_size < 258:
            raise ValueError(
                f"template={template!r} needs {{instruction}}, max_length={max_length} must be at least 2, and "
                f"vocabulary_size={vocabulary_size} at least 258: the bytes and two special tokens."
            )
        self.path = Path(path)
        self.columns = {"client": client, "instruction": instruction, "response": response}
        if rejected is not None:
            self.columns["rejected"] = rejected
        self.tokenizer_file = tokenizer
        self.vocabulary_size = vocabulary_size
        self.template = template
        self.max_length = max_length

    def read(self) -> ClientData:
        """Reads the file; the texts stay in memory, and are tokenized when they are needed."""
        found: dict[ClientId, list[Mapping[str, str]]] = {}
        for client, row in self._rows():
            found.setdefault(client, []).append(row)
        if not found:
            raise ValueError(f"{self.path} has no examples; expected JSON lines.")
        ids = sorted(found, key=lambda client: (isinstance(client, str), client))
        return ClientData(ids, lambda client: len(found[client]), lambda client: _Examples(self, found[client]))

    def _rows(self) -> Iterator[tuple[ClientId, Mapping[str, str]]]:
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                    row = {name: found[column] for name, column in self.columns.items()}
                    client = as_client_id(row.pop("client"))
                    if not all(isinstance(text, str) for text in row.values()):
                        raise ValueError(f"{[*row]} must be strings")
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{self.path}, line {number}: expected an object with {', '.join(self.columns.values())} "
                        f"({type(error).__name__}: {error})."
                    ) from error
                yield client, row

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, a ``tokenizers.Tokenizer``."""
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("InstructionDataModule needs tokenizers: pip install 'lightning-fl[language]'") from error
        if self.tokenizer_file is not None:
            found = tokenizers.Tokenizer.from_file(str(self.tokenizer_file))
        else:
            found = train_tokenizer((text for _, row in self._rows() for text in row.values()), self.vocabulary_size)
        missing = [token for token in (PAD, END) if found.token_to_id(token) is None]
        if missing:
            raise ValueError(f"The tokenizer has no {' and '.join(missing)}; add them as special tokens.")
        return found

    @property
    def described_columns(self) -> dict[str, str]:
        """The meaning of the token ids, to be compared between silos."""
        return {"tokenizer": hashlib.blake2b(self.tokenizer.to_str().encode(), digest_size=16).hexdigest()}

    def encode(self, instruction: str, response: str) -> tuple[list[int], list[int]]:
        """The tokens of an example, and their labels."""
        prompt = self.encode_prompt(instruction)
        answer = [*self.tokenizer.encode(response).ids[: self.max_length - 1], self.tokenizer.token_to_id(END)]
        prompt = prompt[: self.max_length - len(answer)]
        return [*prompt, *answer], [*([IGNORED] * len(prompt)), *answer]

    def encode_prompt(self, instruction: str) -> list[int]:
        """The tokens before a response."""
        ids: list[int] = self.tokenizer.encode(self.template.format(instruction=instruction)).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a sequence of tokens, up to the end token."""
        end = self.tokenizer.token_to_id(END)
        kept = list(tokens)[: list(tokens).index(end)] if end in tokens else list(tokens)
        text: str = self.tokenizer.decode(kept)
        return text

    @property
    def end_token(self) -> int:
        """The token that ends a response."""
        number: int = self.tokenizer.token_to_id(END)
        return number

    def collate(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """A batch of examples, padded to the longest."""
        batch: dict[str, Tensor] = {}
        for prefix in ("", "rejected_") if "rejected_input_ids" in examples[0] else ("",):
            tokens = [torch.tensor(example[f"{prefix}input_ids"]) for example in examples]
            labels = [torch.tensor(example[f"{prefix}labels"]) for example in examples]
            pad = self.tokenizer.token_to_id(PAD)
            batch[f"{prefix}input_ids"] = _padded(tokens, pad)
            batch[f"{prefix}attention_mask"] = _padded([torch.ones_like(own) for own in tokens], 0)
            batch[f"{prefix}labels"] = _padded(labels, IGNORED)
        return batch


class _Examples(Dataset):
    def __init__(self, owner: InstructionDataModule, rows: Sequence[Mapping[str, str]]) -> None:
        self.owner, self.rows = owner, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row, found = self.rows[index], {}
        for prefix, column in (("", "response"), ("rejected_", "rejected")):
            if column in row:
                found[f"{prefix}input_ids"], found[f"{prefix}labels"] = self.owner.encode(
                    row["instruction"], row[column]
                )
        return found


def _padded(parts: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)


def train_tokenizer(texts: Iterator[str], vocabulary_size: int = 512) -> Any:
    """A byte-level BPE trained on texts, a ``tokenizers.Tokenizer`` with the tokens ``<pad>`` (0) and ``<end>`` (1).

    Args:
        texts: The texts.
        vocabulary_size: Number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
