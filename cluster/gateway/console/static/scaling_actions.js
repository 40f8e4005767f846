/** Operators' actions on models: scale by hand or by demand, freeze, unfreeze. Each asks first. */

import { confirmDialog, showMessage } from "./dialog.js";

const REASON = { name: "reason", label: "Reason", hint: "For the audit log." };

/** @param {any} context */
export function modelActions({ api, feed }) {
  return {
    scale: (model) => {
      const wanted = feed.lists.scaling.get(model)?.wanted ?? feed.lists.models.get(model)?.replicas_desired ?? 1;
      return confirmDialog({
        title: `Scale ${model}`,
        fields: [
          {
            name: "to",
            label: "Number of replicas",
            type: "radio",
            value: "fixed",
            options: [
              ["fixed", "A fixed number, until it is changed again"],
              ["auto", "By demand"],
            ],
          },
          {
            name: "replicas",
            label: "Replicas",
            type: "number",
            value: String(wanted),
            attributes: { min: "0", step: "1", inputmode: "numeric" },
            hint: "0 ends all replicas: calls then wait or are refused.",
          },
          REASON,
        ],
        confirm: "Scale",
        act: async ({ to, replicas, reason }) => {
          const number = Number(replicas);
          if (to === "fixed" && (!Number.isInteger(number) || number < 0 || String(replicas).trim() === ""))
            throw Object.assign(new Error("Replicas: enter a whole number of 0 or more."), { field: "replicas" });
          await api.verb("Catalog.Scale", {
            name: model,
            reason,
            ...(to === "auto" ? { auto: true } : { replicas: number }),
          });
          showMessage(to === "auto" ? `${model} is scaled by demand` : `${model} is scaled to ${number}`);
        },
      });
    },
    freeze: (model) =>
      confirmDialog({
        title: `Freeze ${model}`,
        text: "The number of replicas stays as it is: no scaling and no rollout until it is unfrozen.",
        fields: [REASON],
        confirm: "Freeze",
        act: async ({ reason }) => {
          await api.verb("Catalog.Freeze", { name: model, reason });
          showMessage(`${model} is frozen`);
        },
      }),
    unfreeze: (model) =>
      confirmDialog({
        title: `Unfreeze ${model}`,
        text: "Scaling and rollouts continue.",
        fields: [REASON],
        confirm: "Unfreeze",
        act: async ({ reason }) => {
          await api.verb("Catalog.Unfreeze", { name: model, reason });
          showMessage(`${model} is no longer frozen`);
        },
      }),
  };
}
