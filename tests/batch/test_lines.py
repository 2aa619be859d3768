"""Prompts from files of every kind: what a row may say, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffuse_jax.batch.jobs import FIELDS, Image, Rules
from diffuse_jax.batch.lines import MAX_LINE, lines_of

KNOWN = [*FIELDS, "id"]


def read(source: Any) -> list[Any]:
    """Number and fields of each row, or the error."""
    lines = lines_of(source, KNOWN)
    found = []
    for row in lines.rows():
        try:
            found.append((row.number, dict(lines.fields(row.raw))))
        except ValueError as error:
            found.append((row.number, str(error)))
    return found


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    """Empty lines count, so that numbers are those of an editor; a byte order mark and Windows' line ends go."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  \nein Hündchen\n# no comment".encode())
    assert read(path) == [(1, {"prompt": "a cat"}), (4, {"prompt": "ein Hündchen"}), (5, {"prompt": "# no comment"})]


def test_a_line_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [b'{"prompt": "a"}', b'{"prompt"', b"[1]", b'"b"', b"\xff\xfe", b'{"prompt": "' + b"x" * MAX_LINE + b'"}']
    lines += [b"[" * 100_000, b'{"prompt": "z", "seed": null}', b'{"prompt": "a", "seed": NaN}']
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [fields for _, fields in found if isinstance(fields, dict)] == [
        {"prompt": "a"}, {"prompt": "b"}, {"prompt": "z"},
    ]  # fmt: skip
    errors = [error for _, error in found if isinstance(error, str)]
    parts = ("not JSON", "got list", "not UTF-8", "longer than", "nested", "NaN is not a number")
    for error, part in zip(errors, parts, strict=True):
        assert part in error


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,seed,id\n"a, b",1,x\n"two\nlines",,y\nonly one\nlast,"3 4",\n', encoding="utf-8")
    assert read(path) == [
        (1, {"prompt": "a, b", "seed": "1", "id": "x"}),
        (2, {"prompt": "two\nlines", "id": "y"}),
        (3, "it has 1 cells for 3 columns; quote cells that contain commas"),
        (4, {"prompt": "last", "seed": "3 4"}),
    ]
    path.write_bytes(b"prompt\na\xff\nfine\n")
    assert read(path) == [(1, "it is not UTF-8"), (2, {"prompt": "fine"})]


def test_columns_are_checked_before_any_row_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    for header, error in {
        "promt": "no column 'prompt'",
        "prompt,colour": "column 'colour', which is no setting",
        "prompt,prompt": "twice",
        '"prompt" ,seed': r"prompts\.csv: its header is not a row of CSV",
    }.items():  # fmt: skip
        path.write_text(f"{header}\na,b\n", encoding="utf-8")
        with pytest.raises(ValueError, match=error):
            lines_of(path, KNOWN)


def test_parquet(tmp_path: Path) -> None:
    """What is null in a table with gaps is not given; counts that gaps made floats are counts."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.parquet"
    columns = {"prompt": ["a", None, "c"], "height": [64.0, None, float("nan")], "id": [1, 2, 3]}
    parquet.write_table(pa.table({**columns, "lora": [{"x": 0.5}, None, {"x": None}]}), path, row_group_size=2)
    found = read(path)
    rules = Rules({}, 0, ("id",), {})
    jobs = [rules.job(number, fields) for number, fields in found if "prompt" in fields]
    assert [(job.number, dict(job.call), dict(job.lora), dict(job.kept)) for job in jobs] == [
        (1, {"prompt": "a", "height": 64}, {"x": 0.5}, {"id": 1}),
        (3, {"prompt": "c"}, {}, {"id": 3}),
    ]
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(ValueError, match=r"prompts\.parquet is damaged"):
        read(path)
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match="not a Parquet file"):
        lines_of(path, KNOWN)


def test_what_is_no_source_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"read from .txt, .jsonl, .csv, .parquet files"):
        lines_of("prompts.docx", KNOWN)
    with pytest.raises(FileNotFoundError, match=r"none.txt"):
        lines_of(tmp_path / "none.txt", KNOWN)
    with pytest.raises(TypeError, match="read twice"):
        lines_of(iter(["a"]), KNOWN)


def test_settings_are_those_of_the_row_or_the_job() -> None:
    rules = Rules({"height": 64, "num_images_per_prompt": 2}, 100, (), {})
    job = rules.job(3, {"prompt": "a", "guidance_scale": "2.5", "lora": "b.safetensors=0.5 a.safetensors"})
    assert job.call == {"prompt": "a", "height": 64, "guidance_scale": 2.5}
    assert job.lora == {"a.safetensors": 1.0, "b.safetensors": 0.5}
    assert [*job.seeds] == [106, 107], "two images a row from seed 100 on: those of different rows differ"
    assert [*rules.job(3, {"prompt": "a", "seed": 7}).seeds] == [7, 8]
    assert rules.job(3, {"prompt": "a", "seed": [7, 9, 1]}).seeds == [7, 9, 1]
    assert len(rules.job(3, {"prompt": "a", "num_images_per_prompt": 2**31 - 1}).seeds) == 2**31 - 1, "not a list"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "no prompt"),
        ({"prompt": "  "}, "no prompt"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        ({"prompt": "\ud800"}, "valid Unicode"),
        ({"prompt": "a", "guidence_scale": 2}, "'guidence_scale', which is no setting"),
        ({"prompt": "a", "height": -8}, "height must be a whole number"),
        ({"prompt": "a", "height": 64.5}, "height must be a whole number"),
        ({"prompt": "a", "num_inference_steps": "many"}, "num_inference_steps must be"),
        ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"prompt": "a", "seed": [1, 1]}, "must not name a seed twice"),
        ({"prompt": "a", "seed": []}, "at least one number"),
        ({"prompt": "a", "seed": 2**32}, "must be less than 4294967296"),
        ({"prompt": "a", "seed": 2**32 - 1, "num_images_per_prompt": 2}, "must be less than 4294967296"),
        ({"prompt": "a", "seed": [1, 2], "num_images_per_prompt": 3}, "2 seeds for num_images_per_prompt=3"),
        ({"prompt": "a", "lora": {"x": "strong"}}, "finite number for x"),
        ({"prompt": "a", "lora": 3}, "lora must be"),
        ({"prompt": "a", "lora": '{"x":' * 100_000}, "lora must be FILE=WEIGHT"),
        ({"prompt": "a", "lora": {"x": 10**400}}, "finite number for x"),
        ({"prompt": "a", "seed": 10**400}, "seed must be a whole number"),
        ({"prompt": "a", "guidance_scale": 10**400}, "guidance_scale must be a finite number"),
        ({"prompt": "a", "long_prompts": "perhaps"}, "true or false"),
        ({"prompt": "a", "noise": "pink"}, "torch or cuda"),
        ({"prompt": "a", "id": {1, 2}}, "JSON cannot hold"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Rules({}, 0, ("id",), {}).job(1, fields)


def test_every_setting_of_a_row_is_an_argument_of_some_pipeline() -> None:
    from diffuse_jax import StableDiffusionXLPipeline
    from diffuse_jax.pipelines.options import argument_names

    assert {*FIELDS} - {"lora"} <= argument_names(StableDiffusionXLPipeline)


def test_a_record_can_be_stored() -> None:
    rules = Rules({}, 0, (), {"model": "m"})
    record = rules.record(Image(rules.job(1, {"prompt": "a"}), 1), "x.png")
    assert json.loads(json.dumps(record)) == record
