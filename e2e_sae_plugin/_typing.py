"""Run-time shape checks of the public functions: jaxtyping's annotations, checked by beartype.

`JAXTYPING_DISABLE=1` in the environment switches them off.
"""

from beartype import beartype
from jaxtyping import jaxtyped

shape_checked = jaxtyped(typechecker=beartype)
