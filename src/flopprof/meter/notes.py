"""What a meter's reader is told of how steps were counted."""

OUTSIDE = (
    "a model is called inside a compiled function, where its inputs are not seen: use meter.track(loader), "
    "meter.step(batch) or meter.wrap(step), whose arguments then tell steps apart."
)
BYPASSED = (
    "no model is called in the steps, but something of it (model.forward, model.loss), whose inputs are not seen: use "
    "meter.track(loader), meter.step(batch) or meter.wrap(step), whose arguments then tell steps apart."
)
WIDENED = (
    "what a segment of the steps multiplies depends on what came before in the step, and is told by that since it was "
    "seen: earlier steps may be wrong; recount_every= narrows it down."
)
CLOSURES = "what an optimizer with a closure multiplies itself depends on its state, and is in no count."
CORRECTED = (
    "{} of the counts differed from an earlier one of the same signature: work depends on something that shapes do not "
    "tell; recount_every= narrows it down."
)
