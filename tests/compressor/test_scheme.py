import pytest

from compressor.scheme import LowRank, QuantizationConfig, Scheme

LAYERS = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]


def test_record_round_trips_and_shares_one_pattern() -> None:
    low_rank = Scheme("sparse24_int4", 64, low_rank=LowRank(16))
    schemes = {**dict.fromkeys(LAYERS, low_rank), "lm_head": Scheme("int8")}
    record = QuantizationConfig.from_schemes(schemes).to_dict()
    assert record["config_groups"]["group_0"]["targets"] == [r"re:model\.layers\.\d+\.mlp\.up_proj"]
    config = QuantizationConfig.from_dict(record)
    assert {name: config.scheme_of(name) for name in schemes} == schemes
    assert config.scheme_of("model.layers.0.mlp.up_proj.extra") is None
    assert config.scheme_of("model.norm") is None


def test_layers_that_differ_keep_their_own_names() -> None:
    schemes = {name: Scheme("int4" if i else "int8", 64) for i, name in enumerate(LAYERS)}
    config = QuantizationConfig.from_dict(QuantizationConfig.from_schemes(schemes).to_dict())
    assert {name: config.scheme_of(name) for name in schemes} == schemes


def test_a_layer_that_stays_as_it_was_is_ignored() -> None:
    schemes = {name: Scheme("int4", 64) for name in LAYERS[1:]}
    config = QuantizationConfig.from_schemes(schemes, plain=[LAYERS[0], "model.norm"])
    assert config.ignore == (LAYERS[0],)
    read = QuantizationConfig.from_dict(config.to_dict())
    assert read.scheme_of(LAYERS[0]) is None
    assert {name: read.scheme_of(name) for name in schemes} == schemes


def test_ignore_wins() -> None:
    record = QuantizationConfig.from_schemes(dict.fromkeys(LAYERS, Scheme("int8"))).to_dict()
    config = QuantizationConfig.from_dict({**record, "ignore": [LAYERS[3]]})
    assert config.scheme_of(LAYERS[3]) is None
    assert config.scheme_of(LAYERS[4]) == Scheme("int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method"),
        ({"version": 2}, "format version 2"),
        ({"extra": 1}, "unknown keys"),
        ({"config_groups": []}, "config_groups"),
        ({"config_groups": {"a": {"targets": ["x"], "format": "int4", "sise": 3}}}, "unknown keys"),
        ({"config_groups": {"a": {"targets": ["re:(a+)+$"], "format": "int4"}}}, "not accepted"),
        ({"config_groups": {"a": {"targets": "x", "format": "int4"}}}, "must be a list"),
        ({"config_groups": {"a": {"targets": ["x"], "group_size": 0}}}, "group_size"),
        ({"config_groups": {"a": {"targets": ["x"], "group_size": True}}}, "group_size"),
        ({"config_groups": {"a": {"targets": ["x"], "dtype": "float64"}}}, "dtype"),
        ({"config_groups": {"a": {"targets": ["x"], "low_rank": {"segment": -1}}}}, "segment"),
        ({"ignore": [3]}, "ignore"),
    ],
)
def test_hostile_records_are_refused(change: dict[str, object], message: str) -> None:
    record = QuantizationConfig.from_schemes({"x": Scheme("int4", 64)}).to_dict()
    with pytest.raises(ValueError, match=message):
        QuantizationConfig.from_dict({**record, **change})
