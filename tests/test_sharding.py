"""Eight devices give what one does, and the program of data parallelism gathers no more."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, assert_close, normal, normalised
from jax import lax, nn
from jax.ops import segment_sum
from jax.sharding import AxisType, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

import hesscale_jax as hs

DEVICES, BATCH, WIDTH, HIDDEN = 8, 16, 8, 16
LABELS = np.arange(BATCH) % WIDTH
INPUTS = normal(BATCH, WIDTH, seed=3)
PARAMS = {
    "scale": 1 + 0.1 * normal(WIDTH),
    "into": normal(WIDTH, HIDDEN) / 2,
    "bias": normal(HIDDEN, seed=1) / 3,
    "back": normal(HIDDEN, WIDTH, seed=1) / 3,
    "out": normal(WIDTH, WIDTH, seed=2),
}

every_curvature = pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])


def loss(params, x, labels, hidden=lambda x, params: mlp(x, params)):
    x = x + hidden(normalised(x, -1) * params["scale"][None], params)
    logits = normalised(x, -1) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(x, params):
    return nn.gelu(x @ params["into"] + params["bias"][None]) @ params["back"]


def mesh_of(kind, shape=(DEVICES,), names=("devices",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


REPLICATED = dict.fromkeys(PARAMS, P())
BY_ROW = dict.fromkeys(PARAMS, P("devices"))
BY_TENSOR = REPLICATED | {
    "into": P(None, "devices"),
    "bias": P("devices"),
    "back": P("devices", None),
}
LAYOUTS = {  # of the parameters, and of the batch
    "data parallel": (REPLICATED, P("devices")),
    "fully sharded": (BY_ROW, P("devices")),
    "tensor parallel": (BY_TENSOR, P()),
}


def placed(mesh, layout):
    params, data = LAYOUTS[layout]
    put = {name: jax.device_put(p, NamedSharding(mesh, params[name])) for name, p in PARAMS.items()}
    return put, *(jax.device_put(x, NamedSharding(mesh, data)) for x in (INPUTS, LABELS))


@every_curvature
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_arrays(layout, curvature):
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto)):
        args = placed(mesh, layout)
        received = jax.jit(hs.value_and_hesscale(loss, curvature=curvature))(*args)
    assert_close(received, on_one_device(curvature))


@every_curvature
def test_explicit_sharding(curvature):
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        args = placed(mesh, "data parallel")
        received = jax.jit(hs.value_and_hesscale(loss, curvature=curvature))(*args)
    assert_close(received, on_one_device(curvature))


def by_columns_and_rows(params, x, labels):
    def hidden(x, params):
        h = nn.gelu(x @ params["into"] + jnp.broadcast_to(params["bias"], (BATCH, HIDDEN)))
        return jnp.einsum("bh,hw->bw", h, params["back"], out_sharding=P())

    return loss(params, x, labels, hidden)


def gathered(params, x, labels):
    return loss({name: jax.sharding.reshard(p, P()) for name, p in params.items()}, x, labels)


@every_curvature
def test_explicit_tensor_parallelism(curvature):
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        args = placed(mesh, "tensor parallel")
        transformed = hs.value_and_hesscale(by_columns_and_rows, curvature=curvature)
        received = jax.jit(transformed)(*args)
    assert_close(received, on_one_device(curvature))


@pytest.mark.parametrize(
    ("layout", "explicit"),
    [("tensor parallel", by_columns_and_rows), ("fully sharded", gathered)],
)
def test_training_on_explicit_axes(layout, explicit):
    """In a loop, where whatever is handed on has to lie as it did; some steps have no curvature."""
    layouts = hs.layouts(loss)(PARAMS, INPUTS, LABELS)
    optimizers = hs.orthogonal_newton(1e-2, layouts), hs.scaled_adahesscale(1e-2, delta=1e-4)

    def trained(loss, params, x, labels):
        def step(state, number):
            def one(transform, optimizer, params, state, name):
                _, (grad, curvature), refreshed = transform(2)(loss)(number, params, x, labels)
                given = {name: curvature, "refreshed": refreshed}
                updates, state = optimizer.update(grad, state, params, **given)
                return optax.apply_updates(params, updates), state

            first, second = state
            first = one(hs.value_and_factors_every, optimizers[0], *first, "factors")
            return (
                first,
                one(hs.value_and_hesscale_every, optimizers[1], *second, "hess_diag"),
            ), ()

        start = [(params, optimizer.init(params)) for optimizer in optimizers]
        return [params for params, _ in lax.scan(step, tuple(start), jnp.arange(3))[0]]

    wanted = jax.jit(lambda *args: trained(loss, *args))(PARAMS, INPUTS, LABELS)
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        args = placed(mesh, layout)
        received = jax.jit(lambda *args: trained(explicit, *args))(*args)
    assert_close(received, wanted)


ROWS = np.arange(BATCH) % DEVICES
SQUARE, COLUMN = normal(DEVICES, DEVICES, seed=4) / 3, normal(DEVICES, 1, seed=6)


def reshard(x, spec):
    """``x`` where a spec says, if there is a mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def recurrent(z):
    """Three steps, of which each reads the same."""
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c) + z, jnp.zeros_like(z))


MEETING = {  # images of one value, of weights or examples that lie on different devices
    "batch norm": lambda w, x: jnp.var(jnp.tanh(nn.standardize(x @ w, 0)) @ COLUMN),
    "added up": lambda w, x: jnp.tanh((jnp.sin(x @ w) * (x @ SQUARE)).sum(0)).sum(),
    "reversed": lambda w, x: jnp.sum(jnp.sin(x @ w) * (x @ w)[::-1]),
    "layer norm": lambda w, x: nn.softplus(nn.standardize(SQUARE @ w) @ w[:, :1]).mean(),
    "moved": lambda w, x: jnp.tanh(reshard(x @ w, P(None, "devices"))).var(),
    "all pairs": lambda w, x: jnp.exp((x @ w)[:, None] - reshard(x @ w, P())[None]).std(),
    "largest": lambda w, x: jnp.sin(lax.top_k(x @ w, 3)[0]).sum(),
    "by ids": lambda w, x: jnp.sin(segment_sum(reshard(x @ w, P()), ROWS, DEVICES)).sum(),
    "repeated": lambda w, x: jnp.exp(jnp.concatenate([w, w]) * jnp.arange(16.0)[:, None]).sum(),
    "complex": lambda w, x: jnp.abs(lax.complex(x @ w, jnp.sin(x @ w))).std(),
    "recurrence": lambda w, x: jnp.sum(jnp.sin(recurrent(x @ w)) * (x @ w)),
    "branches": lambda w, x: jnp.sum(lax.cond(jnp.sum(w) > 0, recurrent, jnp.sin, x @ w) ** 3),
}


@pytest.mark.parametrize("layout", [(P(), P("devices")), (P("devices"), P())], ids=["x", "w"])
@pytest.mark.parametrize("program", MEETING)
def test_images_that_meet_on_explicit_axes(program, layout):
    fun, (w, x) = MEETING[program], (normal(DEVICES, DEVICES, seed=5), normal(BATCH, DEVICES))
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        args = (
            jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip((w, x), layout, strict=True)
        )
        received = jax.jit(hs.value_and_hesscale(fun))(*args)
    assert_close(received, jax.jit(hs.value_and_hesscale(fun))(w, x))


WHOLE = [  # what takes arrays as a whole, and how they are divided
    ("lu of a batch", P("two")),
    ("region", P(), P(None, "two")),
    ("segment softmax, of each column", P(None, "two")),
    ("slogdet of a batch", P("two")),
    ("tridiagonal_solve of a batch", *[P("two")] * 4),
]


@pytest.mark.parametrize(("name", "specs"), [(name, specs) for name, *specs in WHOLE])
def test_rules_of_whole_arrays_on_explicit_axes(name, specs):
    fun, *args = CASES[name]

    def loss(args):
        return sum(jnp.sum(jnp.abs(y) ** 3) for y in jax.tree.leaves(fun(*args)))

    wanted = jax.jit(hs.value_and_hesscale(loss))(args)
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit, (2,), ("two",))):
        args = [jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(args, specs, strict=True)]
        received = jax.jit(hs.value_and_hesscale(loss))(args)
    assert_close(received, wanted)


AUTOMATIC = {  # where the compiler may choose, given what makes it so or not
    "all": lambda auto, w, x: auto(lambda w, x: jnp.tanh(x @ w).sum(), P())(w, x),
    "softmax": lambda auto, w, x: auto(nn.softmax, P("devices"))(x @ w).std(),
    "custom rules": lambda auto, w, x: auto(lambda z: nn.relu(z) + nn.gelu(z), P())(x @ w).var(),
    "beside": lambda auto, w, x: jnp.sin((x @ w) * auto(jnp.exp, P("devices"))(x @ w)).sum(),
    "loop": lambda auto, w, x: auto(
        lambda w, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x), P()
    )(w, x).sum(),
    "scale": lambda auto, w, x: (auto(lambda z: z / z.std(), P("devices"))(x @ w) ** 3).var(),
    "repeat": lambda auto, w, x: jnp.sin(jnp.repeat(x @ w, 2, axis=1)).sum(),
    "rows": lambda auto, w, x: jnp.sin(auto(lambda w: w[ROWS], P("devices"))(w) * x).sum(),
    "einsum": lambda auto, w, x: jnp.sin(
        auto(lambda w, x: jnp.einsum("bi,ij,jk->ik", x, SQUARE, w), P())(w, x)
    ).sum(),
}


@pytest.mark.parametrize("program", AUTOMATIC)
def test_auto_axes_on_a_mesh_of_explicit_ones(program):
    fun, (w, x) = AUTOMATIC[program], (normal(DEVICES, DEVICES, seed=5), normal(BATCH, DEVICES))

    def transformed(automatic):
        return jax.jit(hs.value_and_hesscale(lambda w, x: fun(automatic, w, x)))

    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        args = (
            jax.device_put(w, NamedSharding(mesh, P())),
            jax.device_put(x, NamedSharding(mesh, P("devices"))),
        )
        received = transformed(lambda f, spec: auto_axes(f, out_sharding=spec))(*args)
    assert_close(received, transformed(lambda f, spec: f)(w, x))


def collectives(fun, args):
    text = jax.jit(fun).lower(*args).compile().as_text()
    return {
        kind: len(re.findall(rf"\s{kind}(?:-start)?\(", text))
        for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
    }


def test_data_parallelism_needs_no_more_collectives():
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto)):
        args = placed(mesh, "data parallel")
        ours = collectives(hs.value_and_hesscale(loss), args)
        theirs = collectives(jax.value_and_grad(loss), args)
    assert theirs["all-reduce"] >= 1
    assert ours == theirs


def test_what_is_said_of_an_activation_holds_for_its_curvature():
    """Else the compiler chooses where curvatures and cotangents lie, and may send them around."""

    def constraints(transform):
        def constrained(params, x):
            h = lax.with_sharding_constraint(x @ params["into"], P(None, "devices"))
            return jnp.mean((h @ params["back"]) ** 2)

        text = str(jax.make_jaxpr(transform(constrained))(PARAMS, INPUTS))
        return text.count("= sharding_constraint[")

    with jax.set_mesh(mesh_of(AxisType.Auto)):
        assert constraints(jax.grad) == 2  # The value and its cotangent.
        assert constraints(hs.hesscale) == 3


def test_a_product_keeps_its_axes_on_a_mesh():
    """One CPU takes ``(batch, length, n)`` as a matrix; on a mesh, either axis may be sharded."""

    def of_sequences(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    args = PARAMS["into"], normal(2, 3, WIDTH)
    merged = f"[{2 * 3},{WIDTH}]"
    assert merged in str(jax.make_jaxpr(hs.hesscale(of_sequences))(*args))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        assert merged not in str(jax.make_jaxpr(hs.hesscale(of_sequences))(*args))


# Collectives by hand


def data_parallel(params, x, labels):
    return lax.pmean(loss(params, x, labels), "devices")


def fully_sharded(params, x, labels):
    gathered = {name: lax.all_gather(p, "devices", tiled=True) for name, p in params.items()}
    return lax.pmean(loss(gathered, x, labels), "devices")


def by_tensor(params, x, labels):
    return loss(params, x, labels, lambda *args: lax.psum(mlp(*args), "devices"))


def by_scattered_tensor(params, x, labels):
    def hidden(x, params):
        shares = lax.psum_scatter(mlp(x, params), "devices", scatter_dimension=0, tiled=True)
        return lax.all_gather(shares, "devices", axis=0, tiled=True)

    return loss(params, x, labels, hidden)


def around_a_ring(params, x, labels):
    """Each device sees every part of the batch once."""
    ring = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
    total = jnp.zeros(())
    for _ in range(DEVICES):
        x, labels = (lax.ppermute(a, "devices", ring) for a in (x, labels))
        total += loss(params, x, labels) / DEVICES
    return lax.pmean(total, "devices")


BY_HAND = {
    "pmean": (data_parallel, *LAYOUTS["data parallel"], True),
    "pmean, unchecked": (data_parallel, *LAYOUTS["data parallel"], False),
    "all_gather": (fully_sharded, *LAYOUTS["fully sharded"], True),
    "psum": (by_tensor, *LAYOUTS["tensor parallel"], True),
    "psum_scatter": (by_scattered_tensor, *LAYOUTS["tensor parallel"], False),
    "ppermute": (around_a_ring, *LAYOUTS["data parallel"], True),
}


@every_curvature
@pytest.mark.parametrize("name", BY_HAND)
def test_shard_map_in_the_loss(name, curvature):
    fun, params, data, checked = BY_HAND[name]
    mapped = jax.shard_map(
        fun,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(params, data, data),
        out_specs=P(),
        check_vma=checked,
    )
    received = jax.jit(hs.value_and_hesscale(mapped, curvature=curvature))(PARAMS, INPUTS, LABELS)
    theirs = jax.jit(jax.value_and_grad(mapped))(PARAMS, INPUTS, LABELS)
    assert_close((received[0], received[1][0]), theirs)
    assert_close(received, on_one_device(curvature))


def test_shard_map_around():
    """The usual step of data parallelism: derivatives of the local loss, averaged."""

    def step(params, x, labels):
        # Marked as differing by device, or the transpose would already sum over devices.
        params = jax.tree.map(lambda p: lax.pcast(p, "devices", to="varying"), params)
        value, (grad, hess_diag) = hs.value_and_hesscale(loss)(params, x, labels)
        grad = lax.pmean(grad, "devices")
        return lax.pmean(value, "devices"), (grad, lax.pmean(hess_diag, "devices"))

    data = P("devices")
    mapped = jax.shard_map(
        step, mesh=mesh_of(AxisType.Auto), in_specs=(P(), data, data), out_specs=P()
    )
    received = jax.jit(mapped)(PARAMS, INPUTS, LABELS)
    assert_close(received, on_one_device("hessian"))


STEPS = jnp.array([0.2, -0.3, 0.5])

# Functions of a device's logits: those with a derivative rule of their own, and the like
ON_DEVICE = {
    "relu": nn.relu,
    "softplus": nn.softplus,
    "hard_swish": nn.hard_swish,
    "loop": lambda z: lax.scan(lambda y, c: (y * z + c, c), lax.stop_gradient(z), STEPS)[0],
    "xlogy": lambda z: jax.scipy.special.xlogy(z**2, z**2),
    "scan": lambda z: lax.scan(lambda y, t: (nn.relu(y * t + z), y), 1 + z, STEPS)[0],
    "cond": lambda z: lax.cond(z.sum() > 0, nn.relu, nn.softplus, z),
    "spectrum": lambda z: jnp.abs(jnp.fft.rfft(jnp.concatenate([nn.relu(z), z], 1))),
    "solve": lambda z: jnp.linalg.solve((2 + z[0, 0] ** 2) * jnp.eye(2), nn.relu(z[0])),
    "masked": lambda z: jnp.cumsum(jnp.where(z > 0, jnp.log(jnp.where(z > 0, z, 1.0)), 0.0)),
}


@pytest.mark.parametrize("name", ON_DEVICE)
def test_functions_on_a_device(name):
    def local(w, x):
        return jnp.sum(ON_DEVICE[name](x @ w) ** 2)

    def around(w, x):
        w = lax.pcast(w, "devices", to="varying")
        return lax.psum(hs.hesscale(local)(w, x), "devices")

    def mapped(fun):
        specs = {"in_specs": (P(), P("devices")), "out_specs": P()}
        return jax.shard_map(fun, mesh=mesh_of(AxisType.Auto), **specs)

    w, x = normal(3, 2), normal(DEVICES, 3, seed=1)
    within = hs.hesscale(mapped(lambda w, x: lax.psum(local(w, x), "devices")))
    by_row = jax.jit(jax.vmap(hs.hesscale(local), (None, 0)))(w, x[:, None])
    expected = jax.tree.map(lambda x: x.sum(0), by_row)
    for received in jax.jit(lambda w: (within(w, x), mapped(around)(w, x)))(w):
        assert_close(received, expected)


def test_functions_on_a_device_of_an_explicit_mesh():
    def local(w, x):
        return lax.psum(jnp.sum(nn.relu(x @ w) ** 2), "devices")

    w, x = normal(3, 2), normal(DEVICES, 3, seed=1)
    expected = jax.jit(hs.hesscale(lambda w, x: jnp.sum(nn.relu(x @ w) ** 2)))(w, x)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        mapped = jax.shard_map(local, in_specs=(P(), P("devices")), out_specs=P())
        received = jax.jit(hs.hesscale(mapped))(w, jax.reshard(x, P("devices")))
    assert_close(received, expected)


def test_shard_map_over_one_of_two_axes():
    mesh = mesh_of(AxisType.Auto, (4, 2), ("data", "model"))
    mapped = jax.shard_map(
        lambda *args: lax.pmean(loss(*args), "data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        received = jax.jit(hs.value_and_hesscale(mapped))(PARAMS, INPUTS, LABELS)
    assert_close(received, on_one_device("hessian"))


def test_vmap_inside_and_outside_with_spmd_axis_name():
    mesh = mesh_of(AxisType.Auto)

    def constrained(params, x, label):
        x = lax.with_sharding_constraint(x[None], NamedSharding(mesh, P(None, None)))
        return loss(params, x, label[None])

    def by_example(params, x, labels):
        each = jax.vmap(constrained, (None, 0, 0), spmd_axis_name="devices")
        return each(params, x, labels).mean()

    with jax.set_mesh(mesh):
        args = placed(mesh, "data parallel")
        received = jax.jit(hs.value_and_hesscale(by_example))(*args)
        assert_close(received, on_one_device("hessian"))
        each = jax.vmap(hs.value_and_hesscale(constrained), (None, 0, 0), spmd_axis_name="devices")
        mean = jax.tree.map(lambda x: x.mean(0), jax.jit(each)(*args))
    assert_close(mean, on_one_device("hessian"))


def test_collectives_over_a_mapped_axis():
    def by_name(params, x, labels):
        each = jax.vmap(
            lambda x, label: lax.pmean(loss(params, x[None], label[None]), "batch"),
            axis_name="batch",
        )
        return each(x, labels)[0]

    received = jax.jit(hs.value_and_hesscale(by_name))(PARAMS, INPUTS, LABELS)
    assert_close(received, on_one_device("hessian"))


EXACT = {"curvature": "exact_gauss_newton"}


def averaged(local, check_vma=False):
    """The exact Gauss-Newton diagonal of each device's loss, averaged."""

    def step(*args):
        return lax.pmean(hs.value_and_hesscale(local, **EXACT)(*args), "devices")

    mesh, data = mesh_of(AxisType.Auto), P("devices")
    return jax.shard_map(
        step, mesh=mesh, in_specs=(P(), data, data), out_specs=P(), check_vma=check_vma
    )


@pytest.mark.parametrize("local", [loss, data_parallel])
def test_exact_gauss_newton_of_each_device(local):
    received = jax.jit(averaged(local))(PARAMS, INPUTS, LABELS)
    assert_close(received, on_one_device(**EXACT))


def test_exact_gauss_newton_of_sharded_arrays():
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto)):
        args = placed(mesh, "data parallel")
        received = jax.jit(hs.value_and_hesscale(loss, **EXACT))(*args)
    assert_close(received, on_one_device(**EXACT))


def test_where_exact_gauss_newton_is_not_known_an_error_says_so():
    args, data = (PARAMS, INPUTS, LABELS), P("devices")
    inside = jax.shard_map(
        data_parallel, mesh=mesh_of(AxisType.Auto), in_specs=(P(), data, data), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"'shard_map', used at .*check_vma=False"):
        hs.hesscale(inside, **EXACT)(*args)
    with pytest.raises(ValueError, match=r"vary by device.*check_vma=False"):
        jax.jit(averaged(loss, check_vma=True))(*args)
    with pytest.raises(ValueError, match=r"'psum', used at .*test_sharding.py"):
        jax.jit(averaged(lambda *args: jnp.sqrt(data_parallel(*args))))(*args)
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        args = placed(mesh, "data parallel")
        with pytest.raises(ValueError, match=r"AxisType\.Explicit.*AxisType\.Auto"):
            jax.jit(hs.hesscale(loss, **EXACT))(*args)


def test_a_sampled_region_of_each_example_on_an_explicit_mesh():
    def by_example(params, x):
        layer = jax.vmap(hs.sampled(lambda w, x: jnp.tanh(x @ w)), (None, 0))
        return jnp.mean(layer(params["into"], x) ** 2)

    expected = hs.value_and_hesscale(by_example)(PARAMS, INPUTS)
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        params, x, _ = placed(mesh, "data parallel")
        received = jax.jit(hs.value_and_hesscale(by_example))(params, x)
    assert_close(received, expected)


def on_one_device(curvature):
    return jax.jit(hs.value_and_hesscale(loss, curvature=curvature))(PARAMS, INPUTS, LABELS)
