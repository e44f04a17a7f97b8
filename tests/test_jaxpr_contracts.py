"""What the library assumes about JAX's internals, one test each."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from jax import lax, nn
from jax._src import source_info_util
from jax.experimental import io_callback, pallas
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Value, flatten, trace

CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


def names(fun, *args):
    return [eqn.name for eqn in flatten(trace(fun, *args)).equations]


def evaluate(fun, *args):
    """Run a flattened program."""
    program = flatten(trace(fun, *args))
    return _jaxpr.evaluate(program, args, program.outputs)


def test_nested_calls_are_written_out():
    fun = jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1)
    assert [e.primitive.name for e in trace(fun, 1.0).jaxpr.eqns] == ["jit"]
    assert names(fun, 1.0) == ["sin", "add"]


def test_one_jaxpr_called_twice_is_two_computations():
    silu = jax.jit(nn.silu)
    assert names(lambda x: silu(silu(x)), 1.0).count("logistic") == 2


def test_equal_equations_are_one():
    assert names(lambda x: jnp.sin(x) + jnp.sin(x), 1.0) == ["sin", "add"]
    assert names(lambda x: x[:2] + x[1:], normal(3)).count("slice") == 2
    assert names(lambda x: nn.relu(x) * nn.relu(x), 1.0) == ["custom_jvp_call", "mul"]
    assert names(lambda x: x * 2.0 + x * 2.0, 1.0) == ["mul", "add"]
    assert names(lambda x: (x + np.ones(3)) * (x + np.zeros(3)), normal(3)).count("add") == 2


def test_products_take_transposed_operands_as_they_are():
    assert names(lambda x: x.T @ x, normal(3, 2)) == ["dot_general"]
    fun = lambda x, w: x.transpose(2, 0, 1) @ w  # noqa: E731
    args = normal(4, 5, 3), normal(5, 2)
    # The result has its free axes in the order of the transposed operand.
    assert names(fun, normal(4, 5, 3), normal(5, 2)) == ["transpose", "dot_general"]
    for f, xs in ((fun, args), (lambda x, w: x.T @ w.T, (normal(3, 2), normal(4, 3)))):
        np.testing.assert_allclose(evaluate(f, *xs)[0], f(*xs), rtol=1e-14)


def test_operands_that_only_compare_equal_are_not_merged():
    def fun(x):
        return jnp.arctan2(x, 0.0), jnp.arctan2(x, -0.0), jnp.arctan2(x, jnp.nan)

    received, expected = evaluate(fun, 0.0), fun(0.0)
    np.testing.assert_array_equal(received, expected)
    assert received[0] != received[1]


def test_custom_derivatives_without_floating_operands_are_merged():
    @jax.custom_jvp
    def double(n):
        return 2 * n

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0]))
    assert names(lambda n: double(n) + double(n), 1).count("custom_jvp_call") == 1


def test_effects_are_neither_merged_nor_dropped():
    def fun(x):
        jax.debug.callback(lambda x: None, x)
        jax.debug.callback(lambda x: None, x)
        return x

    assert len(names(fun, 1.0)) == 2


def test_callbacks_are_known_by_their_names():
    shape = jax.ShapeDtypeStruct((), jnp.float64)
    calls = [
        lambda x: jax.debug.callback(lambda x: None, x),
        lambda x: jax.pure_callback(np.sin, shape, x),
        lambda x: io_callback(np.sin, shape, x),
    ]
    for call in calls:
        assert _jaxpr.holds_callback({"jaxpr": trace(jax.jit(call), 1.0)})
    assert not _jaxpr.holds_callback({"jaxpr": trace(jax.jit(jnp.sin), 1.0)})


def test_mutable_arrays_are_effects_of_what_uses_them():
    def fun(ref):
        return lax.cond(ref[...] > 0, lambda: ref[...], lambda: 0.0)

    *_, eqn = flatten(trace(fun, jax.new_ref(jnp.zeros(())))).equations
    assert _jaxpr.uses_state(eqn)
    (eqn,) = flatten(trace(lambda x: jax.debug.callback(lambda x: None, x), 1.0)).equations
    assert not _jaxpr.uses_state(eqn)
    body, given = _jaxpr.without_state(
        flatten(trace(fun, jax.new_ref(1.0))).equations[-1].bodies[1]
    )
    assert len(given) == 1
    assert body.program.equations == []


def test_what_is_known_is_outside_of_a_transposed_function():
    """Partial evaluation does not take a branch with a mutable array, even of what is known."""
    ref = jax.new_ref(jnp.zeros(()))

    def count():
        ref[...] += 1

    def fun(x):
        with _jaxpr.at_once():
            lax.cond(True, count, lambda: None)
        return 2 * x

    (received,) = jax.linear_transpose(fun, 1.0)(1.0)
    assert received == 2
    assert ref[...] == 1


def test_derivatives_are_traced_without_effects_that_nobody_needs():
    calls = []

    def fun(x):
        jax.debug.callback(lambda x: calls.append(x), x)
        return jnp.sin(x)

    closed, (received,) = _jaxpr.pure(jax.jit(fun), 1.0)
    jax.effects_barrier()
    assert closed.effects
    assert calls == []
    assert received == jnp.sin(1.0)


def test_flags_that_look_for_nans():
    assert not _jaxpr.stops_at_nans()
    for flag in (jax.debug_nans, jax.debug_infs):
        with flag(True):
            assert _jaxpr.stops_at_nans()


def test_what_no_output_needs_is_left_out():
    def fun(x):
        jnp.cos(x)
        return jnp.sin(x)

    assert names(fun, 1.0) == ["sin"]


def test_dot_products_without_free_axes_are_sums():
    x, w = normal(2, 4, 3), normal(4, 3, 2, seed=1)

    def rows(x, w):
        return lax.dot_general(x, w, (((1,), (0,)), ((2, 0), (1, 2))))

    assert "dot_general" not in names(rows, x, w)
    np.testing.assert_allclose(evaluate(rows, x, w)[0], rows(x, w), rtol=1e-12)
    assert "dot_general" in names(jnp.matmul, x[0], w[:3, :, 0])


def test_a_program_computes_what_the_function_does():
    def fun(x, n):
        y = nn.softplus(x) @ x.T
        y = y + lax.fori_loop(0, n, lambda i, s: s + i, 0.0)
        return (
            jnp.where(y > 0, y, jnp.linalg.inv(y)),
            jax.random.normal(jax.random.key(0), (2,)),
            3.0,
        )

    x = normal(3, 4)
    for received, expected in zip(evaluate(fun, x, 3), fun(x, 3), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_parameters_and_operands_can_be_replaced():
    (eqn,) = flatten(trace(jnp.matmul, normal(2, 3), normal(3, 2))).equations
    half = [normal(2, 3).astype(jnp.bfloat16), normal(3, 2).astype(jnp.bfloat16)]
    result = _jaxpr.bind(eqn, *half, preferred_element_type=jnp.float32)
    assert result.dtype == jnp.float32


def test_one_result_is_not_a_list():
    (eqn,) = flatten(trace(nn.relu, 1.0)).equations
    assert eqn.primitive.multiple_results
    assert _jaxpr.bind(eqn, -1.0) == 0
    assert _jaxpr.listed(1.0, eqn) == [1.0]


def test_custom_derivatives_survive_binding():
    (eqn,) = flatten(trace(nn.relu, 1.0)).equations
    assert jax.grad(lambda x: _jaxpr.bind(eqn, x))(0.0) == 0  # that of max would be 1/2


def test_locations_name_the_user_s_line():
    def user_function(x):
        return jnp.sin(x)

    (eqn,) = flatten(trace(user_function, 1.0)).equations
    line = user_function.__code__.co_firstlineno + 1
    assert _jaxpr.location(eqn).startswith(f"{__file__}:{line} (")
    # Inside a function of JAX's own, which is jitted: the line of the call.
    equations = flatten(trace(lambda x: jnp.fft.fft(x), normal(2))).equations
    inner = next(e for e in equations if _jaxpr.label(e) == "custom_jvp_call[complex.fft]")
    assert _jaxpr.location(inner).startswith(__file__)


def test_lines_in_bodies_are_those_of_the_call_where_there_is_no_other():
    fun = jnp.linalg.slogdet
    eqn = next(e for e in flatten(trace(lambda x: fun(x)[1], normal(2, 2))).equations if e.bodies)
    inner = eqn.bodies[0].program.equations[0]
    assert source_info_util.user_frame(inner.sources[0].source_info.traceback) is None
    assert _jaxpr.location(inner).startswith(__file__)


def test_lines_in_libraries_give_way_to_the_users():
    eqn = flatten(trace(lambda x: optax.l2_loss(x), 1.0)).equations[0]
    frame = source_info_util.user_frame(eqn.sources[0].source_info.traceback)
    assert frame.file_name.startswith(_jaxpr.INSTALLED)
    assert _jaxpr.user_frame(eqn).file_name == __file__
    assert _jaxpr.library_frame(eqn).file_name == frame.file_name


def test_a_library_s_wrapper_is_next_to_the_function_that_it_calls():
    @equinox.filter_custom_vjp
    def kernel(x):
        return jnp.sin(x)

    kernel.def_fwd(lambda perturbed, x: (kernel(x), x))
    kernel.def_bwd(lambda x, g, perturbed, same: g * jnp.cos(x))
    (eqn,) = flatten(trace(kernel, 1.0)).equations
    assert eqn.params["call_jaxpr"].jaxpr.debug_info.func_name == "fn_wrapped"
    assert _jaxpr.label(eqn) == "custom_vjp_call[kernel]"


def test_what_is_bound_carries_the_user_s_line():
    def user_function(x):
        return jnp.sin(x)

    (eqn,) = flatten(trace(user_function, 1.0)).equations

    def rebound(x):
        with _jaxpr.context(eqn):
            return lax.cos(x)

    (made,) = flatten(trace(rebound, 1.0)).equations
    assert _jaxpr.location(made) == _jaxpr.location(eqn)


def test_zero_outputs_are_recognised():
    def second(f):
        return lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1], (x,), (x,))[1]

    for f in (nn.relu, jnp.abs, lambda x: 2 * x, lambda x: lax.clamp(0.0, x, 1.0)):
        assert _jaxpr.zero_outputs(trace(second(f), normal(3))) == [True]
    for f in (nn.softplus, jnp.square):
        assert _jaxpr.zero_outputs(trace(second(f), normal(3))) == [False]


@pytest.mark.parametrize(
    "fun", [lambda x: x, lambda x: (x, x), lambda x: 1.0], ids=["input", "twice", "literal"]
)
def test_outputs_that_no_equation_makes(fun):
    program = flatten(trace(fun, 1.0))
    assert program.equations == []
    assert all(isinstance(v, Value | Constant) for v in program.outputs)


def test_calls_that_are_written_out():
    made = trace(jax.jit(jnp.sin), 1.0).jaxpr.eqns + trace(jax.checkpoint(jnp.sin), 1.0).jaxpr.eqns
    assert all(e.primitive.name in _jaxpr.CALLS for e in made)
    assert [len(_jaxpr.called(e).jaxpr.eqns) for e in made] == [1, 1]


def test_checkpoint_marks_a_region():
    policy = jax.checkpoint_policies.dots_saveable
    inner = jax.checkpoint(lambda x: jnp.sin(x) * 2, policy=policy, prevent_cse=False)
    fun = jax.checkpoint(lambda x: jnp.cos(inner(x)))
    sin, mul, cos, add = flatten(trace(lambda x: 1 + fun(x), 1.0)).equations
    assert add.region is None
    assert sin.region is mul.region
    assert sin.region.parent is cos.region
    assert cos.region.parent is None
    assert sin.region.options == {"policy": policy, "prevent_cse": False}
    assert cos.region.options == {"policy": None, "prevent_cse": True}


def test_groups_of_scan():
    def fun(w, x, y):
        return lax.scan(lambda c, xy: ((xy[0] + w, c[0]), xy[1] * w), (x[0], x[0]), (x, y))

    (eqn,) = (e for e in flatten(trace(fun, 1.0, normal(3), normal(3))).equations if e.bodies)
    assert [list(group) for group in _jaxpr.scan_groups(eqn)] == [[0], [1, 2], [3, 4]]
    (body,) = eqn.bodies
    assert list(body.inputs) == [0, 1, 2, 3, 4]
    assert body.carry == {0: 1, 1: 2}
    assert [v.shape for v in body.program.inputs] == [()] * 5
    assert len(body.program.outputs) == len(eqn.outputs) == 3
    assert {"length", "reverse", "unroll"} <= eqn.params.keys()


def test_bodies_of_while_and_cond():
    def loop(n, w, x):
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * w), (0, x))

    (eqn,) = flatten(trace(loop, 3, 1.0, 2.0)).equations
    (body,) = eqn.bodies
    operands = [eqn.inputs[i].shape for i in body.inputs]
    assert operands == [v.shape for v in body.program.inputs]
    assert [list(body.inputs), body.carry] == [[1, 2, 3], {0: 1, 1: 2}]

    def branches(i, x):
        return lax.switch(i, [jnp.sin, jnp.cos, lambda x: x], x)

    eqn = flatten(trace(branches, 1, 2.0)).equations[-1]
    assert [list(body.inputs) for body in eqn.bodies] == [[1]] * 3
    assert [[e.name for e in body.program.equations] for body in eqn.bodies] == [
        ["sin"],
        ["cos"],
        [],
    ]


def test_bodies_of_functions_with_their_own_derivatives():
    for wrap in (jax.custom_jvp, jax.custom_vjp):

        @wrap
        def scaled(x, n):
            return jnp.sin(x) * n

        if wrap is jax.custom_jvp:
            scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0]))
        else:
            scaled.defvjp(lambda x, n: (scaled(x, n), None), lambda _, g: (g, None))
        eqn = flatten(trace(scaled, 1.0, 2)).equations[-1]
        assert _jaxpr.label(eqn) == f"{eqn.name}[scaled]"
        (body,) = eqn.bodies
        assert list(body.inputs) == [0, 1]
        assert "sin" in [e.name for e in body.program.equations]


def test_labels_of_kernels():
    def kernel(x, y):
        y[...] = x[...] * 2

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    named = pallas.pallas_call(kernel, shape, name="doubled", interpret=True)
    (eqn,) = flatten(trace(named, jnp.zeros(3, jnp.float32))).equations
    assert _jaxpr.label(eqn) == "pallas_call[doubled]"
    (eqn,) = flatten(trace(jax.ffi.ffi_call("doubled", shape), jnp.zeros(3))).equations
    assert _jaxpr.label(eqn) == "ffi_call[doubled]"
    (eqn,) = flatten(trace(jnp.sin, 1.0)).equations
    assert _jaxpr.label(eqn) == "sin"


def test_shard_map_is_bound_again():
    spec = jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    fun = jax.shard_map(lambda x: x - lax.pmean(x, "d"), mesh=mesh, in_specs=spec, out_specs=spec)
    (eqn,) = (e for e in flatten(trace(fun, normal(8))).equations if e.name == "shard_map")
    (body,) = eqn.bodies
    assert body.program.inputs[0].shape == (2,)
    again = _jaxpr.shard_mapped(eqn, lambda x: (x - lax.pmean(x, "d"),), eqn.params["in_specs"])
    np.testing.assert_array_equal(again(normal(8))[0], fun(normal(8)))


def test_names_that_the_library_matches():
    named = trace(lambda x: jax.ad_checkpoint.checkpoint_name(x, "model_output"), 1.0).jaxpr.eqns
    assert [(e.primitive.name, e.params["name"]) for e in named] == [("name", "model_output")]
    assert isinstance(trace(jnp.sin, 1.0), core.ClosedJaxpr)


def test_complex_values_are_in_parts_where_they_move():
    def fun(x):
        z = lax.complex(x, 2 * x)
        still = lax.complex(lax.stop_gradient(x), x)
        return (z * 1j).real, still.imag, jnp.fft.fft(np.ones(3)).real, z

    x = normal(3)
    equations = flatten(trace(fun, x)).equations
    # The data's transform is as it was, and one value leaves the program as a whole.
    assert [e.name for e in equations].count("fft") == 1
    assert [e.name for e in equations].count("complex") == 1
    for got, want in zip(evaluate(fun, x), fun(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_transform_within_a_function_of_parts():
    (eqn,) = flatten(trace(lambda x: jnp.fft.rfft2(x).real, normal(3, 4))).equations
    assert _jaxpr.transform(eqn) == (lax.FftType.RFFT, (3, 4))
    assert eqn.bodies == ()


def test_a_linear_solve_has_its_operator_first_and_its_right_hand_sides_last():
    matrix = jnp.eye(3)
    solve = jax.make_jaxpr(jnp.linalg.solve)(matrix, jnp.ones(3))
    program = _jaxpr.flatten(solve)
    (eqn,) = (eqn for eqn in program.equations if eqn.name == "custom_linear_solve")
    assert eqn.params["const_lengths"].matvec == 1
    assert eqn.inputs[0] is program.inputs[0]
    assert eqn.inputs[-1] is program.inputs[1]
    assert len(eqn.params["jaxprs"].matvec.jaxpr.invars) == 2


def test_collectives_are_told_from_other_effects_and_what_varies_by_device_by_its_type():
    def printed(x):
        jax.debug.print("{}", x)
        return lax.psum(x, "d")

    effects = {}
    mesh, spec = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec("d")

    def of_device(x):
        for name, fun in {"psum": lambda x: lax.psum(x, "d"), "print": printed}.items():
            program = _jaxpr.flatten(_jaxpr.trace(fun, x))
            effects[name] = [_jaxpr.has_effects(program, c) for c in (True, False)]
            assert any(map(_jaxpr.is_collective, program.equations))
            assert all(map(_jaxpr.varies, program.inputs))
        return x

    jax.shard_map(of_device, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(2))
    assert effects == {"psum": [True, False], "print": [True, True]}
    assert not any(map(_jaxpr.varies, _jaxpr.flatten(_jaxpr.trace(jnp.sin, 1.0)).inputs))


def test_equations_run_in_float32_in_place_of_half_precision():
    def computed(x, ids):
        y = jnp.dot(x, x, preferred_element_type=x.dtype) + x.astype("float32").astype(x.dtype)
        bits = lax.bitcast_convert_type(y, "uint16")
        return jnp.sum(y[ids], dtype=x.dtype), jnp.zeros_like(x).at[ids].add(x[ids]), bits

    x, ids = jnp.full((3, 3), 300.0, "float16"), jnp.array([0, 2])
    program = _jaxpr.flatten(_jaxpr.trace(computed, x, ids))
    total, added, bits = _jaxpr.evaluate(program, [x, ids], program.outputs, _jaxpr.run_widely)
    assert (total.dtype, added.dtype, bits.dtype) == ("float32", "float32", "uint16")
    assert total == 6 * (3 * 300.0**2 + 300)  # beyond float16
    assert jnp.array_equal(added, x.astype("float32").at[1].set(0))


def test_what_a_program_takes_is_counted():
    def taken(fun, *args):
        traced = trace(fun, *args)
        of_program = _jaxpr.work(flatten(traced).equations)
        assert of_program == _jaxpr.work(traced.jaxpr.eqns)
        return of_program

    def convolved(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST)

    image, kernel, x, w = (jnp.ones(s) for s in ((1, 8, 8, 3), (3, 3, 3, 5), (2, 3), (3, 3)))
    assert taken(jnp.dot, x, w) == (2 * 3 * 3, 6)
    assert taken(convolved, image, kernel) == (8 * 8 * 5 * 27, 320)
    assert taken(lambda x, w: lax.fori_loop(0, 600, lambda i, y: y @ w, x), x, w) == (600 * 19, 6)
    assert taken(jax.jit(jnp.sin), w) == (9, 9)
