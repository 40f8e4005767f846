"""LiteLLM's tables in PostgreSQL, with the columns that the import reads, from schema.prisma of release 1.108."""

from __future__ import annotations

import psycopg

SCHEMA = """
CREATE TABLE "LiteLLM_BudgetTable" (
  "budget_id" TEXT PRIMARY KEY, "max_budget" DOUBLE PRECISION, "soft_budget" DOUBLE PRECISION,
  "max_parallel_requests" INTEGER, "tpm_limit" BIGINT, "rpm_limit" BIGINT, "tpd_limit" BIGINT,
  "model_max_budget" JSONB, "budget_duration" TEXT, "budget_reset_at" TIMESTAMP(3),
  "allowed_models" TEXT[] DEFAULT ARRAY[]::TEXT[],
  "created_by" TEXT NOT NULL DEFAULT 'x', "updated_by" TEXT NOT NULL DEFAULT 'x');
CREATE TABLE "LiteLLM_ModelTable" (
  "id" SERIAL PRIMARY KEY, "aliases" JSONB, "created_by" TEXT NOT NULL DEFAULT 'x',
  "updated_by" TEXT NOT NULL DEFAULT 'x');
CREATE TABLE "LiteLLM_OrganizationTable" (
  "organization_id" TEXT PRIMARY KEY, "organization_alias" TEXT NOT NULL,
  "budget_id" TEXT NOT NULL REFERENCES "LiteLLM_BudgetTable"("budget_id"), "metadata" JSONB NOT NULL DEFAULT '{}',
  "models" TEXT[], "spend" DOUBLE PRECISION NOT NULL DEFAULT 0.0, "model_spend" JSONB NOT NULL DEFAULT '{}',
  "created_by" TEXT NOT NULL DEFAULT 'x', "updated_by" TEXT NOT NULL DEFAULT 'x');
CREATE TABLE "LiteLLM_TeamTable" (
  "team_id" TEXT PRIMARY KEY, "team_alias" TEXT,
  "organization_id" TEXT REFERENCES "LiteLLM_OrganizationTable"("organization_id"), "object_permission_id" TEXT,
  "admins" TEXT[], "members" TEXT[], "members_with_roles" JSONB NOT NULL DEFAULT '{}',
  "metadata" JSONB NOT NULL DEFAULT '{}', "max_budget" DOUBLE PRECISION, "soft_budget" DOUBLE PRECISION,
  "spend" DOUBLE PRECISION NOT NULL DEFAULT 0.0, "models" TEXT[], "max_parallel_requests" INTEGER,
  "tpm_limit" BIGINT, "rpm_limit" BIGINT, "tpd_limit" BIGINT, "budget_duration" TEXT,
  "budget_reset_at" TIMESTAMP(3), "blocked" BOOLEAN NOT NULL DEFAULT false,
  "model_spend" JSONB NOT NULL DEFAULT '{}', "model_max_budget" JSONB NOT NULL DEFAULT '{}',
  "router_settings" JSONB DEFAULT '{}', "access_group_ids" TEXT[] DEFAULT ARRAY[]::TEXT[],
  "policies" TEXT[] DEFAULT ARRAY[]::TEXT[], "budget_limits" JSONB,
  "model_id" INTEGER UNIQUE REFERENCES "LiteLLM_ModelTable"("id"));
CREATE TABLE "LiteLLM_UserTable" (
  "user_id" TEXT PRIMARY KEY, "user_alias" TEXT, "team_id" TEXT, "max_budget" DOUBLE PRECISION,
  "spend" DOUBLE PRECISION NOT NULL DEFAULT 0.0, "user_email" TEXT, "models" TEXT[],
  "max_parallel_requests" INTEGER, "tpm_limit" BIGINT, "rpm_limit" BIGINT, "budget_duration" TEXT);
CREATE TABLE "LiteLLM_VerificationToken" (
  "token" TEXT PRIMARY KEY, "key_name" TEXT, "key_alias" TEXT, "soft_budget_cooldown" BOOLEAN NOT NULL DEFAULT false,
  "spend" DOUBLE PRECISION NOT NULL DEFAULT 0.0, "expires" TIMESTAMP(3), "models" TEXT[],
  "aliases" JSONB NOT NULL DEFAULT '{}', "config" JSONB NOT NULL DEFAULT '{}', "router_settings" JSONB DEFAULT '{}',
  "user_id" TEXT, "team_id" TEXT, "permissions" JSONB NOT NULL DEFAULT '{}', "max_parallel_requests" INTEGER,
  "metadata" JSONB NOT NULL DEFAULT '{}', "blocked" BOOLEAN, "tpm_limit" BIGINT, "rpm_limit" BIGINT,
  "tpd_limit" BIGINT, "max_budget" DOUBLE PRECISION, "budget_duration" TEXT, "budget_reset_at" TIMESTAMP(3),
  "allowed_cache_controls" TEXT[] DEFAULT ARRAY[]::TEXT[], "allowed_routes" TEXT[] DEFAULT ARRAY[]::TEXT[],
  "policies" TEXT[] DEFAULT ARRAY[]::TEXT[], "access_group_ids" TEXT[] DEFAULT ARRAY[]::TEXT[],
  "model_spend" JSONB NOT NULL DEFAULT '{}', "model_max_budget" JSONB NOT NULL DEFAULT '{}',
  "budget_id" TEXT REFERENCES "LiteLLM_BudgetTable"("budget_id"), "organization_id" TEXT,
  "object_permission_id" TEXT, "budget_limits" JSONB);
CREATE TABLE "LiteLLM_DeprecatedVerificationToken" (
  "id" TEXT PRIMARY KEY, "token" TEXT NOT NULL UNIQUE, "active_token_id" TEXT NOT NULL,
  "revoke_at" TIMESTAMP(3) NOT NULL, "created_at" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE "LiteLLM_TeamMembership" (
  "user_id" TEXT NOT NULL, "team_id" TEXT NOT NULL, "spend" DOUBLE PRECISION NOT NULL DEFAULT 0.0,
  "budget_id" TEXT REFERENCES "LiteLLM_BudgetTable"("budget_id"), PRIMARY KEY ("user_id", "team_id"));
"""


def make(connection: psycopg.Connection[object]) -> None:
    """Create LiteLLM's tables."""
    connection.execute(SCHEMA.encode())
