"""What nodes say of their inputs, as far as the core knows the fields."""


def test_inputs_have_display_names(pack):
    for node in pack.nodes.NODES:
        for each in node.GET_SCHEMA().inputs:
            assert each.display_name[0].isupper() and "_" not in each.display_name, (node, each.id)
    labels = {each.id: each.display_name for each in pack.nodes.OneShotTune.GET_SCHEMA().inputs}
    assert labels["learning_rate"] == "Learning rate" and labels["vae"] == "VAE"


def test_what_a_beginner_does_not_need_is_advanced(pack):
    from comfy_api.latest import io

    inputs = pack.nodes.Inflate.GET_SCHEMA().inputs
    folded = {each.id for each in inputs if each.as_dict().get("advanced")}
    assert folded == ({"temporal_causal", "norm"} if hasattr(io.Boolean.Input("any"), "advanced") else set())
