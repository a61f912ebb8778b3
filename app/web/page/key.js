// Asks for the service's key when it wants one.

import { find } from "./dom.js";
import { explain } from "./problems.js";

/** @param {import("./api.js").Api} api @param {() => Promise<void>} open called with each key that is tried */
export function listenForKey(api, open) {
  const dialog = find("key");
  const problem = find("key-problem");
  const forget = find("forget-key");
  const showState = () => {
    forget.hidden = !api.key;
  };
  showState();

  find("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    problem.hidden = true;
    api.keepKey(find("key-value").value.trim());
    try {
      await open();
      find("key-value").value = "";
      dialog.close();
    } catch (error) {
      api.keepKey("");
      problem.textContent = error.wantsKey ? "The service doesn't know this key." : explain(error);
      problem.hidden = false;
      find("key-value").select();
    }
    showState();
  });
  find("key-later").addEventListener("click", () => dialog.close());
  forget.addEventListener("click", () => {
    api.keepKey("");
    showState();
    find("choose").focus(); // the button that had the focus has gone
  });

  return () => {
    if (dialog.open) return;
    problem.hidden = true;
    dialog.showModal();
    find("key-value").focus();
  };
}
