from functools import partial
from pathlib import Path

import pytest

from compressor.recipe import RecipeError, check_streamable, load_recipe, parse_budget, parse_recipe, recipe_names
from compressor.retraining import Budget
from compressor.retraining.schedules import learning_rate
from compressor.scheme import LowRank


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_come_with_the_package_are_valid_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.description) > 20
    assert parse_recipe(recipe.model_dump(mode="json", exclude_none=True)) == recipe


@pytest.mark.parametrize(
    ("text", "budget"),
    [("90s", Budget(seconds=90)), ("1.5h", Budget(seconds=5400)), ("2Mtok", Budget(tokens=2_000_000))],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "10", "-5m", "0s", "ten minutes", "5 parsecs"])
def test_bad_budgets_name_good_ones(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: 90s"):
        parse_budget(text)


def test_overrides_reach_nested_settings() -> None:
    recipe = load_recipe(
        "ast-2of4-int4",
        ["retraining.loop.learning_rate=0.001", "retraining.ast.low_rank.segment=32", "quantization.group_size=row"],
    )
    assert recipe.retraining is not None
    assert recipe.retraining.loop.learning_rate == 0.001
    assert recipe.retraining.low_rank == LowRank(32, "int8", False)
    assert recipe.scheme(-1).low_rank == LowRank(32, "int8", False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity.criterion=wandaa", "did you mean 'wanda'"),
        ("retraining.method=astt", "did you mean 'ast'"),
        ("retraining.loop.leaning_rate=1", "did you mean 'learning_rate'"),
        ("retraining.loop.learning_rate=fast", "number"),
        ("quantization.values=int3", "int4"),
        ("quantisation.values=int4", "did you mean 'quantization'"),
        ("sparsity", "section.key=value"),
        ("name.x=1", "not a section"),
        ("ignore=*.v_proj", "quote it: --set \"ignore='...'\""),
    ],
)
def test_mistakes_say_what_is_accepted(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("ast-2of4-int4", [override])


def test_settings_of_a_retraining_add_none_unasked() -> None:
    with pytest.raises(RecipeError, match=r"no retraining.*retraining\.method=ast"):
        load_recipe("one-shot-2of4-int4", ["retraining.loop.batch=2"])
    added = load_recipe("one-shot-2of4-int4", ["retraining.loop.batch=2", "retraining.method=ast"])
    assert added.retraining is not None and added.retraining.loop.batch == 2


@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        ("ast-slorb-2of4-int4", ["retraining.method=cast"], r"--set retraining\.ast=\{\}"),
        ("ast-2of4-int4", ["retraining.heads_and_neurons=0.5"], "by pst only"),
        ("ast-2of4-int4", ["retraining.pst.weight_rank=2"], r"retraining\.pst says nothing to method 'ast'"),
        ("pst-2of4-int4", ["task.name=rte", "sparsity.criterion=magnitude"], r"leave sparsity\.criterion out"),
    ],
)
def test_settings_of_another_method_are_refused(name: str, overrides: list[str], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load_recipe(name, overrides)
    assert load_recipe("ast-slorb-2of4-int4", ["retraining.method=cast", "retraining.ast={}"]).retraining is not None


def test_the_seed_reaches_the_loop_unless_it_has_one_of_its_own() -> None:
    assert load_recipe("ast-2of4-int4", ["seed=3"]).loop.seed == 3
    assert load_recipe("ast-2of4-int4", ["seed=3", "retraining.loop.seed=0"]).loop.seed == 0


def test_files_and_their_faults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("quantization: {values: int8}")
    assert load_recipe(str(path)).name == "mine"
    for broken in ("[1, 2]", "a: [", "sparsity: {}\nretraining: 3"):
        path.write_text(broken)
        with pytest.raises(RecipeError):
            load_recipe(str(path))


def test_retraining_without_sparsity_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs a sparsity section"):
        parse_recipe({"retraining": {"budget": "1m"}})


def test_training_scales_needs_the_whole_model() -> None:
    with pytest.raises(ValueError, match=r"quantization\.scales=null"):
        check_streamable(load_recipe("one-shot-2of4-int4", ["quantization.scales.samples=8"]))


def test_formats_follow_from_sparsity_and_values() -> None:
    base = load_recipe("one-shot-2of4-int4")
    assert base.scheme(64).format == "sparse24_int4"
    assert load_recipe("int4").scheme(64).format == "int4"
    assert load_recipe("ast-2of4-bf16").scheme(64).format == "sparse24"
    assert load_recipe("int4", ["quantization.values=float16"]).scheme(64).dtype == "float16"


def test_ignore_takes_names_and_patterns() -> None:
    recipe = parse_recipe({"ignore": ["a.b", r"re:.*\.k_proj"]})
    assert recipe.ignores("a.b")
    assert recipe.ignores("model.layers.3.k_proj")
    assert not recipe.ignores("a.b.c")
    assert parse_recipe({"ignore": "a.b"}).ignores("a.b")


@pytest.mark.parametrize(
    ("name", "steps", "length", "warmup", "last_cosine", "ramp", "last_decay", "rates", "adam", "loss", "form"),
    [
        (
            "gpt2",
            40_000,
            1024,
            2_000,
            38_000,
            10_000,
            1e-4,
            (2e-4, 2e-5),
            (0.9, 0.95, 0.1, 1.0),
            (0.67, 2.0),
            "decoupled",
        ),
        ("llama", 15_000, 4096, 500, 15_000, 3_000, 6e-5, (2e-5, 2e-6), (0.9, 0.95, 0.0, 1.0), (1 / 3, 2.0), "coupled"),
    ],
)
def test_the_published_settings_are_those_published(
    name: str, steps: int, length: int, warmup: int, last_cosine: int, ramp: int, last_decay: float,
    rates: tuple[float, float], adam: tuple[float, ...], loss: tuple[float, float], form: str,
) -> None:  # fmt: skip
    """The table of the paper and its code: steps of 128 blocks, AdamW, the decay's ramp, CE and KL."""
    recipe = load_recipe(f"ast-paper-{name}")
    assert recipe.sparsity is not None and recipe.retraining is not None
    loop, ast = recipe.retraining.loop, recipe.retraining.ast
    assert parse_budget(recipe.retraining.budget).tokens == steps * 128 * length
    assert (loop.batch, recipe.text.length) == (128, length)
    assert loop.warmup * steps == pytest.approx(warmup, rel=1e-4)
    rate = partial(learning_rate, peak=loop.learning_rate, warmup=loop.warmup, final=loop.final_rate)
    at = [rate(step / steps, schedule=loop.schedule, cooldown=loop.cooldown) for step in (warmup, last_cosine, steps)]
    assert at == pytest.approx([*rates, rates[1] if last_cosine == steps else 0.0], rel=1e-3, abs=1e-12)
    assert (loop.learning_rate, loop.learning_rate * loop.final_rate) == pytest.approx(rates)
    assert (loop.beta1, loop.beta2, loop.weight_decay, loop.clip) == adam
    assert (loop.kl_weight, loop.temperature) == pytest.approx(loss, rel=1e-4)
    assert ast.mask_decay_ramp * steps == pytest.approx(ramp)
    assert (ast.mask_decay, ast.form, ast.refresh_every, ast.masked_start) == (last_decay, form, 10, 1.0)
    assert (recipe.sparsity.criterion, recipe.sparsity.pattern, ast.low_rank) == ("magnitude", "2:4", None)
