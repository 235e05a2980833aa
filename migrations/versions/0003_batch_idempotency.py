"""idempotency keys of batches"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("batches", schema=None) as batch_op:
        batch_op.add_column(sa.Column("idempotency", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("body_digest", sa.String(length=64), nullable=False, server_default=""))
        batch_op.create_unique_constraint(batch_op.f("uq_batches_idempotency"), ["idempotency"])


def downgrade() -> None:
    with op.batch_alter_table("batches", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_batches_idempotency"), type_="unique")
        batch_op.drop_column("body_digest")
        batch_op.drop_column("idempotency")
