"""Find a name that a docstring writes as users know it: `w2`, `Outputs`, `nnx.jit`."""

from docutils import nodes
from sphinx.application import Sphinx

# Where a short name may be, in this order.
OURS = ("kd2m_jax", "kd2m_jax.losses", "kd2m_jax.models", "kd2m_jax.theory")
# What other projects call it in their documentation.
THEIRS = {"nnx": "flax.nnx", "nn": "flax.linen", "jnp": "jax.numpy", "np": "numpy"}
REAL = {"jax.jaxlib._jax.Array": "jax.Array"}  # the name that a signature has


def find(app: Sphinx, env, node, contnode):
    """Return a reference to the first public name that ends so, if there is one."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    domain, target = env.domains.python_domain, REAL.get(target, target)
    for module in OURS:
        name = f"{module}.{target}"
        if name in domain.objects:
            entry = domain.objects[name]
            uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
            return nodes.reference("", "", contnode, internal=True, refuri=f"{uri}#{name}")
    head, _, rest = target.partition(".")
    for full in (target, f"{THEIRS.get(head, head)}.{rest}"):
        for kind in ("py:class", "py:function", "py:attribute", "py:module", "py:exception"):
            if found := env.intersphinx_inventory.get(kind, {}).get(full):
                uri = found.uri if hasattr(found, "uri") else found[2]
                return nodes.reference("", "", contnode, internal=False, refuri=uri)
    return None


def setup(app: Sphinx):
    """Register with Sphinx."""
    app.connect("missing-reference", find)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
