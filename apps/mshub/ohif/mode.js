/* The MSHub mode: OHIF's segmentation mode with MSHub's panels around its segmentation panel. */

import { ID as EXTENSION } from './extension.js';
import { KEYS } from './keys.js';
import { workbench } from './workbench.js';

const SEGMENTATION_MODE = '@ohif/mode-segmentation';
const SEGMENTS = '@ohif/extension-cornerstone.panelModule.panelSegmentationWithToolsLabelMap';
const panel = name => `${EXTENSION}.panelModule.${name}`;
const PAGE = [panel('segment'), SEGMENTS, panel('outcome'), panel('review')];
const MODALITIES = ['CT', 'MR', 'PT'];

// OHIF's toolbox without what cannot work here: tools that download a network from the internet, and one for PET only.
const TOOLBOX = { LabelMapTools: ['BrushTools', 'Shapes', 'LabelMapEditWithContour'] };

export default {
  id: '@mshub/mode',

  async modeFactory({ loadModules }) {
    const [{ modeInstance: base }] = await loadModules([SEGMENTATION_MODE]);
    return {
      ...base,
      id: '@mshub/mode',
      routeName: 'mshub',
      displayName: 'MSHub',
      hangingProtocol: 'default',
      modeModalities: MODALITIES,
      toolbarSections: [...base.toolbarSections, TOOLBOX],
      modeCustomizations: {
        'ohif.hotkeyBindings': { $push: KEYS },
        'panelSegmentation.tableMode': { $set: 'collapsed' },
      },
      routes: [{ ...base.routes[0], layoutTemplate: () => layoutOf(base) }],
      isValidMode({ modalities }) {
        const found = modalities.split('\\').filter(modality => MODALITIES.includes(modality));
        return { valid: found.length > 0, description: `MSHub segments ${MODALITIES.join(', ')} series.` };
      },
      onModeEnter(context) {
        base.onModeEnter.call(this, context);
        workbench.enter();
      },
      onModeExit(context) {
        workbench.leave();
        base.onModeExit.call(this, context);
      },
    };
  },
};

function layoutOf(base) {
  const { id, props } = base.routes[0].layoutInstance;
  return {
    id,
    props: { ...props, rightPanels: [PAGE], viewports: props.viewports.map(viewport => ({ ...viewport })) },
  };
}
