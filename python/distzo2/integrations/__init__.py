"""DistZO2 in the trainers of others: `integrations.transformers` and `integrations.trl`. Nothing else imports them."""

from distzo2.version import require

require(transformers="5.20", accelerate="1.10")
require(optional=True, peft="0.18", datasets="4.0")
